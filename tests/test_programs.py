"""In the benchmark of whole programs, the competitor computes the same as the library, and the command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import released_knet
from benchmarks.program_rows import PROGRAMS, Program
from sprompt.masks import BitMasks
from sprompt.models.knet import KNet, KNetConfig
from sprompt.models.protocol import Features
from sprompt.ops import pack_masks
from sprompt.testing.spec import blobs, random

ROOT = Path(__file__).parents[1]
SIZE = (96, 128)


def losses(
    counts: list[int], num_classes: int, **config: float
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The numbers of the library and of the released formulation, in float32, for images with `counts` targets."""
    torch.manual_seed(1)
    small = {"channels": 32, "heads": 4, "feedforward": 64, "kernels": 7}
    model = KNet(KNetConfig(depth=18, backbone_width=8, num_classes=num_classes, **small, **config))  # type: ignore[arg-type]  # of any type
    g = random(2)
    maps = [torch.randn(len(counts), 32, SIZE[0] // s, SIZE[1] // s, generator=g) for s in (4, 8, 16, 32)]
    most = max(counts)
    dense = torch.stack([blobs(most, *SIZE, image) > 0.5 for image in range(len(counts))])
    labels = torch.randint(0, num_classes, (len(counts), most), generator=g)
    masks = BitMasks(pack_masks(dense).words, SIZE)
    ours = model.losses(model.decode(Features([], maps)), masks, labels, torch.tensor(counts)).terms
    each = [dense[b, :n].to(torch.uint8) for b, n in enumerate(counts)]
    return ours, released_knet.losses(model, maps, each, [labels[b, :n] for b, n in enumerate(counts)])


@pytest.mark.parametrize(
    ("counts", "num_classes"),
    [([4], 1), ([3, 5], 6), ([0, 4], 3), ([9, 2], 2)],
    ids=["one class", "classes", "an image without targets", "more targets than kernels"],
)
def test_the_released_formulation_has_the_librarys_losses(counts: list[int], num_classes: int) -> None:
    weights = {"loss_mask": 1.5, "loss_seg": 0.5, "cost_mask": 3.0, "cost_class": 1.0}
    ours, released = losses(counts, num_classes, **weights)
    assert ours.keys() == released.keys()
    for term, value in ours.items():
        torch.testing.assert_close(value, released[term], rtol=1e-3, atol=1e-5, msg=lambda m, term=term: f"{term}: {m}")


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: f"{p.name}, {p.shape}")
def test_rivals_agree_at_toy_size(program: Program) -> None:
    rivals = program.tiny(torch.device("cpu"))
    assert "ours" in rivals.calls
    assert rivals.check()


def test_the_command_measures_a_row(tmp_path: Path) -> None:
    file = tmp_path / "programs.json"
    command = [sys.executable, "-m", "benchmarks.programs", "--quick", "--device", "cpu", "--row", "Prediction dump"]
    result = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(file.read_text())["rows"]
    assert rows and all(not row["error"] and row["ms"]["ours"] > 0 for row in rows)
    assert "| Prediction dump |" in result.stdout


def test_no_speed_is_told_of_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import programs

    right = released_knet.mask_terms
    monkeypatch.setattr(released_knet, "mask_terms", lambda *a: tuple(1.01 * term for term in right(*a)))
    line = programs.row(PROGRAMS[0], torch.device("cpu"), 0.1, quick=True)
    assert "results disagree: head/bce" in line["error"] and "ms" not in line
    assert "results disagree" in " ".join(programs.cells(line))
