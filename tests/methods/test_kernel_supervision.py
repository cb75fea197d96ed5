"""L_ker of §6: its value, its invariances, its projections, and the monitor of collapse."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sprompt.methods.saliency_prompt.supervision import Projection, kernel_loss, target_cosine
from sprompt.models.protocol import Matched


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


ROWS = [torch.tensor([[4, 1, -1], [0, -1, -1], [2, 3, 5]]), torch.tensor([[1, 4, -1], [5, -1, -1], [5, 3, 2]])]
COUNTS = torch.tensor([2, 1, 3])
PAIRS = 6  # of each stage


def matched(seed: int = 0, scale: float = 1.0) -> list[Matched]:
    return [Matched(scale * drawn(3, 6, 8, seed=seed + s), rows) for s, rows in enumerate(ROWS)]


def literal(targets: Tensor, stages: list[Matched], reduction: str) -> float:
    total = 0.0
    for kernels, rows in stages:
        terms = []
        for b in range(3):
            for l in range(3):
                if rows[b, l] >= 0:
                    t, k = targets[b, l].double().numpy(), kernels[b, rows[b, l]].double().detach().numpy()
                    terms.append(1 - t @ k / (max(np.linalg.norm(t), 1e-8) * max(np.linalg.norm(k), 1e-8)))
        total += np.mean(terms) if reduction == "mean" else np.sum(terms)
    return float(total)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_value(reduction: str) -> None:
    targets = drawn(3, 3, 8, seed=9)
    assert float(kernel_loss(targets, matched(), COUNTS, reduction=reduction)) == pytest.approx(
        literal(targets, matched(), reduction), rel=1e-5
    )


def test_zero_where_kernels_point_as_their_targets_do() -> None:
    targets = drawn(3, 3, 8, seed=9)
    stages = matched()
    for kernels, rows in stages:
        for b in range(3):
            for l in range(3):
                if rows[b, l] >= 0:
                    kernels[b, rows[b, l]] = (1 + l) * targets[b, l]
    assert float(kernel_loss(targets, stages, COUNTS)) == pytest.approx(0, abs=1e-6)
    assert float(kernel_loss(-targets, stages, COUNTS)) == pytest.approx(4, abs=1e-5)  # 2 a pair, two stages


def test_release_pairing_takes_kernels_by_place() -> None:
    """Image 0: kernels 1 and 4 with targets 0 and 1, in both stages; image 2: 2, 3, 5 with 0, 1, 2."""
    targets = drawn(3, 3, 8, seed=9)
    ordered = [
        Matched(m.kernels, torch.tensor([[1, 4, -1], rows[1].tolist(), [2, 3, 5]]))
        for m, rows in zip(matched(), ROWS, strict=True)
    ]
    released = kernel_loss(targets, matched(), COUNTS, release_pairing=True)
    torch.testing.assert_close(released, kernel_loss(targets, ordered, COUNTS))
    assert abs(float(released - kernel_loss(targets, matched(), COUNTS))) > 1e-3


@pytest.mark.parametrize("scale", [1e-3, 7.0])
def test_scale_of_seeds_and_kernels_does_not_matter(scale: float) -> None:
    project = Projection(16, 8)
    seeds = drawn(3, 3, 16, seed=4)
    plain = kernel_loss(project(seeds), matched(), COUNTS)
    torch.testing.assert_close(kernel_loss(project(scale * seeds), matched(), COUNTS), plain)
    torch.testing.assert_close(kernel_loss(project(seeds), matched(scale=scale), COUNTS), plain)


@pytest.mark.parametrize("most", [0, 3])
def test_no_pair_is_exactly_zero_and_connected(most: int) -> None:
    project = Projection(16, 8)
    kernels = drawn(3, 6, 8).requires_grad_()
    rows = torch.full((3, most), -1)
    loss = kernel_loss(
        project(torch.zeros(3, most, 16)), [Matched(kernels, rows)] * 2, torch.zeros(3, dtype=torch.int64)
    )
    assert float(loss.detach()) == 0
    loss.backward()
    assert kernels.grad is not None and not kernels.grad.any()
    assert project.weight.grad is not None and not project.weight.grad.any()


def test_gradients_reach_kernels_and_projection_of_pairs_only() -> None:
    project = Projection(16, 8)
    stages = [Matched(m.kernels.requires_grad_(), m.rows) for m in matched()]
    kernel_loss(project(drawn(3, 3, 16, seed=4)), stages, COUNTS).backward()
    for kernels, rows in stages:
        used = torch.zeros(3, 6, dtype=torch.bool)
        for b in range(3):
            used[b, rows[b][rows[b] >= 0]] = True
        assert kernels.grad is not None
        assert torch.equal(kernels.grad.abs().sum(2) > 0, used)
    assert project.weight.grad is not None and project.weight.grad.abs().sum() > 0


# -- projections ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "trained"),
    [("linear", ["weight", "bias"]), ("linear_nobias", ["weight"]), ("frozen_orthogonal", []), ("pca", [])],
)
def test_what_is_trained(kind: str, trained: list[str]) -> None:
    project = Projection(16, 8, kind)
    assert [name for name, _ in project.named_parameters()] == trained
    assert "weight" in project.state_dict()


@pytest.mark.parametrize("kind", ["linear", "linear_nobias", "frozen_orthogonal"])
def test_it_starts_as_a_rotation_drawn_from_the_seed(kind: str) -> None:
    a, b, c = Projection(16, 8, kind, 1), Projection(16, 8, kind, 1), Projection(16, 8, kind, 2)
    torch.testing.assert_close(a.weight @ a.weight.T, torch.eye(8))
    assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, c.weight)
    seeds = drawn(5, 16)
    torch.testing.assert_close(a(seeds), torch.nn.functional.normalize(seeds, dim=1) @ a.weight.T)


@pytest.mark.parametrize("channels", [6, 12])
def test_principal_components(channels: int) -> None:
    """Against numpy's singular values; 12 rows of 8 principal components have 4 of zeros."""
    features = drawn(2, 8, 5, 6) * torch.linspace(2, 0.1, 8)[None, :, None, None] + drawn(1, 8, 1, 1, seed=3)
    project = Projection(8, channels, "pca")
    project.fit(features)
    x = features.permute(0, 2, 3, 1).reshape(-1, 8).double().numpy()
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    centred = x - x.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:channels]
    got = project(torch.from_numpy(x).float()).numpy()
    wanted = centred @ axes.T
    for k in range(len(axes)):
        sign = np.sign(wanted[:, k] @ got[:, k])
        np.testing.assert_allclose(got[:, k], sign * wanted[:, k], atol=1e-4)
    assert not got[:, len(axes) :].any()
    before = project.weight.clone()
    project.fit(drawn(2, 8, 5, 6, seed=5))
    assert torch.equal(project.weight, before), "fitted once"
    loaded = Projection(8, channels, "pca")
    loaded.load_state_dict(project.state_dict())
    loaded.fit(drawn(2, 8, 5, 6, seed=5))
    assert torch.equal(loaded.weight, before), "a loaded one is not fitted anew"


def test_it_computes_in_float32_under_autocast() -> None:
    project, seeds = Projection(16, 8), drawn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(project(seeds), project(seeds.clone()))
        assert project(seeds).dtype == torch.float32


def test_how_alike_targets_are() -> None:
    units = torch.nn.functional.normalize(drawn(2, 4, 8), dim=2)
    flat = torch.cat([units[0, :3], units[1, :2]]).double()
    gram = (flat @ flat.T).numpy()
    wanted = (gram.sum() - 5) / 20
    assert float(target_cosine(3 * units, torch.tensor([3, 2]))) == pytest.approx(wanted, abs=1e-5)
    assert float(target_cosine(torch.ones(2, 4, 8), torch.tensor([4, 4]))) == pytest.approx(1)
    assert float(target_cosine(units, torch.tensor([1, 0]))) == 0
    assert float(target_cosine(units[:, :0], torch.tensor([0, 0]))) == 0
