"""Prepares the inputs that all cells of a study share: pictures, their split, the backbone, proposals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sprompt.data.synthetic import write_scenes
from sprompt.study.masks import shuffled, truth
from sprompt.study.plan import Inputs
from sprompt.study.split import link_pictures, split
from sprompt.study.variants import VARIANTS

Command = Callable[[Sequence[str], Path], object]  # runs a command; its output goes to a file in the folder


@dataclass(frozen=True)
class Pictures:
    """Pictures of a study. `known` is a COCO file with the true masks of the pictures for pre-training, if there is one."""

    name: str
    unlabelled: Path
    known: Path | None
    images: Path
    annotations: Path
    val_images: Path
    val_annotations: Path


def scenes(out: Path, counts: tuple[int, int, int], side: int, likeness: float) -> Pictures:
    """Writes synthetic scenes to `out`. The counts are: unlabelled scenes, labelled scenes, scenes to test on."""
    folders = [out / name for name in ("unlabelled", "labelled", "validation")]
    for place, (folder, count) in enumerate(zip(folders, counts, strict=True)):
        print(f"drawing {count} scenes in {folder}", flush=True)
        write_scenes(folder, count, seed=100 + place, size=(side, side), likeness=likeness)
    first, second, third = folders
    return Pictures(
        "synthetic scenes", first / "images", first / "instances.json", second / "images", second / "instances.json",
        third / "images", third / "instances.json",
    )  # fmt: skip


def labelled(
    out: Path, images: Path, annotations: Path, val: tuple[Path, Path] | None, unlabelled: Path | None,
    *, val_share: float, within: str | None,
) -> Pictures:  # fmt: skip
    """A labelled data set. Without `val`, a share of its pictures is kept for the test. Without `unlabelled`, its other
    pictures are also used for pre-training, without their labels."""
    train = annotations
    if val is None:
        train, held = split(annotations, out, val_share=val_share, within=within)
        val = (images, held)
    known = None
    if unlabelled is None:
        unlabelled, known = link_pictures(images, train, out / "unlabelled"), train
    folder = images.resolve()
    name = folder.parent.name if folder.name == "images" else folder.name
    return Pictures(name, unlabelled, known, images, train, *val)


def inputs(
    out: Path, pictures: Pictures, settings: tuple[str, str], model: Sequence[str], backbone: Path | None, lengthened: Sequence[str],
    variants: Sequence[str], command: Command,
) -> Inputs:  # fmt: skip
    """Trains a backbone if none is given, finds proposals, and makes the other masks that the variants need."""
    if backbone is None:
        backbone = out / "backbone" / "backbone.safetensors"
        if not backbone.exists():
            print(
                f"training a backbone on the pictures of {pictures.unlabelled}; {backbone.parent}/output.txt",
                flush=True,
            )
            options = ["--preset", settings[0], "--images", str(pictures.unlabelled), "--out", str(backbone.parent)]
            command(["backbone", *options], backbone.parent)
    kinds = {VARIANTS[name].proposals for name in variants if VARIANTS[name].start == "pretrained"}
    found = out / "proposals" / "saliency.json"
    if kinds and not found.exists():
        print(f"finding proposals; {found.parent}/output.txt", flush=True)
        command(
            ["propose", "--preset", settings[0], "--images", str(pictures.unlabelled), "--backbone", str(backbone), "--out", str(found)],
            found.parent,
        )  # fmt: skip
    proposals = {"saliency": found} if kinds else {}
    for kind in kinds - {"saliency"}:
        proposals[kind] = path = found.parent / f"{kind}.json"
        if kind == "shuffled" and not path.exists():
            shuffled(found, path)
        elif kind == "truth" and not path.exists():
            assert pictures.known is not None  # the command offers variant "truth" only if they are known
            truth(pictures.known, found, path)
    return Inputs(
        settings[0], pictures.unlabelled, pictures.images, pictures.annotations, pictures.val_images,
        pictures.val_annotations, backbone, proposals, settings[1], tuple(lengthened), tuple(model),
    )  # fmt: skip
