"""Writes the proposals of a folder of pictures. The work is cut into units: processes share them, and finished units survive a
kill."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from sprompt.atomic import atomic_write
from sprompt.data.errors import DataError
from sprompt.data.folder import PictureFolder
from sprompt.data.sample import Batch, Sample
from sprompt.data.transforms import collate
from sprompt.methods.parts import Parts, ahead
from sprompt.methods.saliency_prompt.config import ProposalConfig
from sprompt.methods.saliency_prompt.proposals import DIVISOR, padded_size, propose, searched, view, view_size
from sprompt.methods.saliency_prompt.records import annotation_records, image_record, merge, merge_vectors

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Generated:
    """The result of one call of `generate`."""

    out: Path | None  # the proposal file; None while units of other processes are missing
    pictures: int  # number of pictures processed by this call
    skipped: list[
        dict[str, str]
    ]  # file_name and reason of the broken pictures in this process's units, including those of earlier calls


def generate(
    pictures: PictureFolder,
    backbone: nn.Module,
    config: ProposalConfig,
    out: Path,
    *,
    unit: int = 16,
    batch: int = 4,
    index: int = 0,
    of: int = 1,
    device: torch.device | str = "cpu",
    vectors: bool = False,
    progress: Progress | None = None,
) -> Generated:
    """Writes the proposal file of a folder of pictures.

    Pictures are cut, in order, into units of `unit` pictures. Process `index` works on the units u with u % of == index. A
    finished unit is a file in the folder OUT.parts, so a call after a kill continues with the unfinished units. The last
    process to finish, or a later call, merges the units into OUT and removes the folder. Within a unit, pictures with views of
    the same padded size go through the backbone together, up to `batch` at a time. The grouping does not depend on `of`, so the
    bytes of the file do not either.

    Unreadable pictures are left out; `info.skipped` lists them with the reason. Pictures without proposals are in the file,
    without annotations.

    Args:
        unit: pictures of a unit, at least 1.
        batch: upper bound of the pictures that go through the backbone together, at least 1.
        index: number of this process, from 0 to of - 1.
        of: number of processes.
        backbone: images -> maps of its `strides`. It is moved to `device`, and set to eval mode.
        vectors: whether to write the feature vectors of the seeds too, to OUT with the suffix .vectors.safetensors.
        progress: called after each unit with the number of finished pictures and of all pictures of this process. If an earlier
            call finished units, it is also called at the start.

    Raises DataError if OUT, or a unit in OUT.parts, was made from other pictures, another backbone or other settings.
    """
    if unit < 1 or batch < 1 or of < 1 or not 0 <= index < of:
        raise ValueError(
            f"generate: unit, batch and of must be at least 1, and index lie in [0, of), got {unit=}, {batch=}, {of=}, {index=}"
        )
    divisor = searched(backbone, config.level).divisor
    units = [range(start, min(start + unit, len(pictures))) for start in range(0, len(pictures), unit)]
    info = _info(pictures, backbone, config, unit, batch, vectors)
    parts = Parts(out, info, len(units), index=index, of=of, results=["skipped"])
    if (finished := parts.finished()) is not None:
        return Generated(parts.out, 0, finished["skipped"])
    todo = parts.todo()
    total = sum(len(units[u]) for u in parts.mine)
    done = total - sum(len(units[u]) for u in todo)
    backbone = backbone.to(device).eval()
    left = set(todo)
    skipped = [entry for u in parts.mine if u not in left for entry in parts.read(u)["skipped"]]
    worked = 0
    if progress is not None and done and todo:
        progress(done, total)
    for u, (batches, broken) in ahead(todo, lambda u: _load(pictures, units[u], config, batch, divisor)):
        _finish(parts, u, batches, broken, pictures, backbone, config, torch.device(device), vectors)
        skipped += broken
        worked += len(units[u])
        if progress is not None:
            progress(done + worked, total)

    def join() -> None:
        if vectors:
            files = [parts.path(u, ".safetensors") for u in range(len(units))]
            merge_vectors(files, parts.out.with_suffix(".vectors.safetensors"))
        merge([parts.path(u) for u in range(len(units))], parts.out, parts.info)

    return Generated(parts.joined(join), worked, skipped)


def fingerprint(backbone: nn.Module) -> str:
    """A hash of a network's floating-point tensors, by name and value. Batch norm's counters are left out: some files lack
    them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        if not tensor.is_floating_point():
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


# -- one unit
Loaded = tuple[list[Batch], list[dict[str, str]]]


def _load(pictures: PictureFolder, places: Sequence[int], config: ProposalConfig, most: int, divisor: int) -> Loaded:
    """(batches, broken pictures) of a unit."""
    groups: dict[tuple[int, int], list[Sample]] = defaultdict(list)
    skipped = []
    for place in places:
        try:
            sample = pictures[place]
        except DataError as error:
            reason = str(error).removeprefix(f"{pictures.path}/")
            skipped.append({"file_name": _file_name(pictures, place), "reason": reason})
            continue
        groups[padded_size(view_size(sample.size, config), divisor)].append(view(sample, config))
    batches = [
        collate(samples[start : start + most], divisor)
        for samples in groups.values()
        for start in range(0, len(samples), most)
    ]
    return batches, skipped


def _finish(
    parts: Parts, number: int, batches: list[Batch], skipped: list[dict[str, str]], pictures: PictureFolder,
    backbone: nn.Module, config: ProposalConfig, device: torch.device, vectors: bool,
) -> None:  # fmt: skip
    """Writes the file of a unit, with its pictures in order."""
    found = {}
    for batch in batches:
        proposals = propose(backbone, batch.to(device), config, vectors=vectors)
        for image_id, size, own in zip(batch.image_ids, batch.original_sizes, proposals, strict=True):
            found[image_id] = (size, own)
    order = sorted(found)
    images = [image_record(i, pictures.file_names[i], found[i][0]) for i in order]
    annotations = [record for i in order for record in annotation_records(i, found[i][1])]
    if vectors:
        rows = [found[i][1].vectors for i in order]
        stacked = torch.cat([r for r in rows if r is not None]) if rows else torch.zeros(0, 0)
        # written first: the unit's own file marks it as finished
        atomic_write(parts.path(number, ".safetensors"), save({"vectors": stacked.half().contiguous()}), sync=True)
    parts.write(number, {"images": images, "annotations": annotations, "skipped": skipped})


# -- all units
def _info(
    pictures: PictureFolder, backbone: nn.Module, config: ProposalConfig, unit: int, batch: int, vectors: bool
) -> dict[str, Any]:
    """The `info` of the file. Units must agree on it to be merged."""
    names = "\n".join(
        f"{i} {name} {_bytes(pictures.path / name)}" for i in pictures.image_ids for name in [pictures.file_names[i]]
    )
    _, stride, divisor = searched(backbone, config.level)
    made = config.record() | {"stride": stride, "backbone": fingerprint(backbone)}
    if divisor != DIVISOR:  # others are left out, so that files written before are resumed
        made["divisor"] = divisor
    return {
        "description": "Saliency mask proposals",
        "proposals": made,
        "pictures": {"count": len(pictures), "names": _digest(names.encode(errors="surrogateescape"))},
        "work": {"unit": unit, "batch": batch, "vectors": vectors},
    }


def _bytes(path: Path) -> int:
    """The size of a file in bytes; −1 if the file cannot be reached, for example behind a link to nothing."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def _file_name(pictures: PictureFolder, place: int) -> str:
    return pictures.file_names[pictures.image_ids[place]]
