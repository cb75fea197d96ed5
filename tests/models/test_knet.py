"""K-Net equals its literal form (knet_eager.py). Further promises: folding, sites, missing targets, precision, sizes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from knet_eager import Forward
from knet_eager import forward as eager_forward
from knet_eager import losses as eager_losses
from knet_eager import predictions as eager_predictions
from torch import Tensor

import sprompt
from sprompt.masks import BitMasks
from sprompt.models.knet import KNet, KNetConfig, loss
from sprompt.models.knet.loss import mask_sums
from sprompt.models.knet.outputs import Outputs
from sprompt.models.protocol import QueryModel

SMALL = KNetConfig(
    depth=18, backbone_width=16, frozen_stages=1, channels=32, kernels=8, num_classes=3, heads=4, feedforward=48
)
SIZE = (96, 128)


def small(seed: int = 0, **changes: object) -> KNet:
    """A small K-Net. Each of its parameters and running statistics changes the outputs."""
    torch.manual_seed(seed)
    model = KNet(replace(SMALL, **changes))  # type: ignore[arg-type]  # fields of any type
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape) if "running_var" in name else torch.randn(tensor.shape)
                tensor += 0.1 * noise
    return model


def batch(counts: tuple[int, ...] = (4, 0, 2), seed: int = 1) -> tuple[Tensor, BitMasks, Tensor, Tensor]:
    """Images, masks, labels and counts. Masks are rectangles and noise; some are thin, some overlap. Labels beyond counts
    are nonsense."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(len(counts), 3, *SIZE, generator=generator)
    most = max(max(counts), 1)
    masks = torch.zeros(len(counts), most, *SIZE, dtype=torch.bool)
    labels = torch.randint(0, 3, (len(counts), most), generator=generator)
    for b, count in enumerate(counts):
        for g in range(count):
            y, x, h, w = (int(torch.randint(0, n, (), generator=generator)) for n in (70, 90, 60, 60))
            masks[b, g, y : y + h + 1, x : x + w + 1] = True
            masks[b, g] ^= torch.rand(SIZE, generator=generator) > 0.97
        labels[b, count:] = 0
    return images, BitMasks.from_dense(masks), labels, torch.tensor(counts)


def literal(
    model: KNet, images: Tensor, masks: BitMasks, labels: Tensor, counts: Tensor
) -> tuple[dict[str, Tensor], Forward, dict[str, Tensor], list[list[dict[int, int]]]]:
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        weights[name].requires_grad_(parameter.requires_grad)
    out = eager_forward(weights, images, model.config.heads)
    dense = masks.to_dense()
    n = counts.tolist()
    terms, matches = eager_losses(
        out, [dense[b, :c] for b, c in enumerate(n)], [labels[b, :c] for b, c in enumerate(n)]
    )
    return weights, out, terms, matches


def compare(outputs: Outputs, out: Forward, rtol: float) -> None:
    for ours, theirs in zip([*outputs.masks, *outputs.classes, *outputs.kernels, outputs.seg],
                            [*out.masks, *out.classes, *out.kernels, out.seg], strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * float(theirs.detach().abs().max()))


def as_rows(matches: list[dict[int, int]], most: int) -> Tensor:
    rows = torch.full((len(matches), most), -1)
    for b, pairs in enumerate(matches):
        for n, g in pairs.items():
            rows[b, g] = n
    return rows


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("counts", [(4, 0, 2), (11, 1, 0)])
def test_literal_form(fold: bool, counts: tuple[int, ...]) -> None:
    """The forward pass, assignments, every term and gradients, in float64. The case (11, …) has more targets than kernels."""
    model = small(fold=fold).double()
    images, masks, labels, real = batch(counts)
    images = images.double()
    weights, out, terms, matches = literal(model, images, masks, labels, real)
    with sprompt.use_backend("reference"):
        outputs = model(images)
        losses = model.losses(outputs, masks, labels, real)
        sum(losses.terms.values()).backward()
    compare(outputs, out, 1e-9)
    assert list(losses.terms) == list(terms)
    for name, term in losses.terms.items():
        torch.testing.assert_close(term, terms[name], rtol=1e-6, atol=1e-9, msg=name)
    for stage, matched in enumerate(losses.matched):
        assert torch.equal(matched.rows, as_rows(matches[stage], masks.shape[1]))
        assert matched.kernels is outputs.kernels[stage]
    sum(terms.values()).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            grad = weights[name].grad
            assert parameter.grad is not None and grad is not None, name
            torch.testing.assert_close(
                parameter.grad, grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()) + 1e-12, msg=name
            )


def test_native_kernels_against_the_literal_form() -> None:
    model = small(2)
    images, masks, labels, counts = batch()
    weights, out, terms, matches = literal(model, images, masks, labels, counts)
    outputs = model(images)
    losses = model.losses(outputs, masks, labels, counts)
    compare(outputs, out, 2e-4)
    for name, term in losses.terms.items():
        torch.testing.assert_close(term, terms[name], rtol=2e-4, atol=1e-6, msg=name)
    assert [m.rows.tolist() for m in losses.matched] == [as_rows(m, 4).tolist() for m in matches]
    sum(losses.terms.values()).backward()
    sum(terms.values()).backward()
    for name in ("neck.fpn_convs.3.conv.weight", "rpn_head.init_kernels.weight", "rpn_head.conv_seg.bias",
                 "roi_head.mask_head.0.feat_transform.conv.bias", "roi_head.mask_head.1.attention.attn.in_proj_weight",
                 "roi_head.mask_head.2.fc_mask.weight", "backbone.layer4.1.bn2.bias"):  # fmt: skip
        grad = weights[name].grad
        ours = model.get_parameter(name).grad
        assert grad is not None
        torch.testing.assert_close(ours, grad, rtol=2e-3, atol=2e-3 * float(grad.abs().max()), msg=name)


def test_reference_backend_is_the_same() -> None:
    model = small(3)
    images, masks, labels, counts = batch()
    native = model.losses(model(images), masks, labels, counts)
    with sprompt.use_backend("reference"):
        reference = model.losses(model(images), masks, labels, counts)
    for name, term in native.terms.items():
        torch.testing.assert_close(term, reference.terms[name], rtol=1e-4, atol=1e-6, msg=name)
    assert all(torch.equal(a.rows, b.rows) for a, b in zip(native.matched, reference.matched, strict=True))


def test_folding_changes_rounding_only() -> None:
    model = small(4)
    images, masks, labels, counts = batch()
    features = model.encode(images)
    results = []
    for fold in (True, False):
        model.config = replace(model.config, fold=fold)
        model.zero_grad()
        outputs = model.decode(features)
        losses = model.losses(outputs, masks, labels, counts)
        sum(losses.terms.values()).backward(retain_graph=True)
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((outputs, losses, grads))
    (folded, a, grads), (unfolded, b, other) = results
    compare(folded, Forward(*unfolded), 1e-4)
    for name, term in a.terms.items():
        torch.testing.assert_close(term, b.terms[name], rtol=1e-4, atol=1e-6, msg=name)
    assert grads.keys() == other.keys()
    for name, grad in grads.items():
        error = float((grad - other[name]).norm() / (other[name].norm() + 1e-12))
        assert error < 1e-3 or float(other[name].norm()) < 1e-5, (name, error)


def test_prompters() -> None:
    model = small(5)
    images = batch()[0]
    features = model.encode(images)
    plain, seen = model.decode(features), []

    def watch(site: str, kernels: Tensor, x: Tensor | None) -> Tensor:
        seen.append((site, kernels, x))
        return kernels

    watched = model.decode(features, watch)
    for a, b in zip([*plain.masks, *plain.classes, *plain.kernels, plain.seg],
                    [*watched.masks, *watched.classes, *watched.kernels, watched.seg], strict=True):  # fmt: skip
        assert torch.equal(a, b)
    assert tuple(site for site, _, _ in seen) == KNet.sites
    learned = model.rpn_head.init_kernels.weight.flatten(1)
    assert torch.equal(seen[0][1], learned.expand(3, -1, -1))
    # K̂ = K⁰ + the sum of x under M⁰ > 0
    loc, sem = model.rpn_head(features.maps)
    pooled = torch.einsum("bnhw,bchw->bnc", (plain.masks[0] > 0).float(), loc + sem)
    torch.testing.assert_close(seen[1][1], learned + pooled, rtol=1e-4, atol=1e-3)
    assert torch.equal(seen[0][2], loc) and torch.equal(seen[1][2], loc + sem), "what the kernels act on"

    prompt = torch.zeros(3, 8, 32)
    prompt[1] = torch.randn(8, 32)

    def at(where: str) -> Outputs:
        return model.decode(features, lambda site, kernels, x: kernels + prompt if site == where else kernels)

    early, late = at("kernel"), at("proposal")
    torch.testing.assert_close(
        early.masks[0][1], torch.einsum("nc,chw->nhw", learned + prompt[1], loc[1]), rtol=1e-4, atol=1e-3
    )
    assert torch.equal(early.masks[0][0], plain.masks[0][0]) and torch.equal(late.masks[0], plain.masks[0])
    for prompted in (early, late):  # only the image with a prompt changes
        torch.testing.assert_close(prompted.kernels[-1][0], plain.kernels[-1][0])
        assert not torch.allclose(prompted.kernels[0][1], plain.kernels[0][1], atol=1e-3)
    with pytest.raises(ValueError, match=r"prompter must return kernels of shape \(3, 8, 32\)"):
        model.decode(features, lambda site, kernels, x: kernels[:, :, None])


@pytest.mark.parametrize("masks_an_image", [0, 3])
def test_without_targets(masks_an_image: int) -> None:
    """Without targets the losses are finite, and every trainable parameter has a gradient."""
    model = small(6)
    images, masks, _, counts = batch((0, 0))
    masks = BitMasks(masks.words.expand(-1, masks_an_image, -1) if masks_an_image else masks.words[:, :0], SIZE)
    losses = model.losses(model(images), masks, torch.zeros(2, masks_an_image, dtype=torch.int64), counts)
    total = sum(losses.terms.values())
    assert isinstance(total, Tensor) and torch.isfinite(total)
    assert all(losses.terms[name].item() == 0 for name in losses.terms if name.endswith(("bce", "dice")))
    assert all((m.rows == -1).all() for m in losses.matched)
    total.backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_padded_pairs_change_nothing() -> None:
    """`select=False`, the form for GPUs, gives the same sums and gradients as `select=True`."""
    model = small(7)
    images, masks, labels, counts = batch()
    outputs = model(images)
    rows = model.losses(outputs, masks, labels, counts).matched[1].rows
    selected = mask_sums(outputs.masks[1], masks, rows, select=True)
    padded = mask_sums(outputs.masks[1], masks, rows, select=False)
    grads = [torch.autograd.grad(sum(pair), outputs.masks[1], retain_graph=True)[0] for pair in (selected, padded)]
    torch.testing.assert_close(selected, padded)
    torch.testing.assert_close(grads[0], grads[1])


def test_costs_that_were_not_finite_reach_the_loss() -> None:
    """On a GPU the assignment gives such an image rows of -2."""
    logits = torch.randn(2, 8, 12, 16)
    masks = BitMasks.from_dense(torch.rand(2, 3, *SIZE) > 0.5)
    rows = torch.tensor([[1, 2, -1], [-2, -2, -2]])
    assert all(torch.isnan(total) for total in mask_sums(logits, masks, rows, select=False))
    assert all(torch.isfinite(total) for total in mask_sums(logits, masks, rows.clamp(min=-1), select=False))


def test_normalisers_are_those_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half of a batch is normalised by the sums of both halves. Then the mean of their losses is the loss of the whole
    batch."""
    model = small(8)
    images, masks, labels, counts = batch((4, 0, 2, 1))
    whole = model.losses(model(images), masks, labels, counts).terms
    halves = [slice(0, 2), slice(2, 4)]
    sums: list[Tensor] = []
    monkeypatch.setattr(loss, "all_sum", lambda x: sums.append(x) or x)
    for half in halves:
        model.losses(model(images[half]), masks[half], labels[half], counts[half])
    monkeypatch.setattr(loss, "world", lambda: 2)
    monkeypatch.setattr(loss, "all_sum", lambda x: sums[0] + sums[1])
    parts = [model.losses(model(images[half]), masks[half], labels[half], counts[half]).terms for half in halves]
    for name, term in whole.items():
        torch.testing.assert_close((parts[0][name] + parts[1][name]) / 2, term, rtol=1e-4, atol=1e-6, msg=name)


def test_predictions() -> None:
    model = small(9).eval()
    images = batch()[0]
    sizes, originals = [(96, 128), (90, 101), (75, 128)], [(200, 260), (61, 67), (75, 128)]
    with torch.no_grad():
        outputs = model(images)
    for threshold, most in ((0.5, 10), (0.3, 100)):
        found = model.predictions(outputs, SIZE, sizes, originals, threshold=threshold, max_per_image=most)
        expected = eager_predictions(Forward(*outputs), sizes, originals, threshold, most)
        for ours, (masks, scores, labels) in zip(found, expected, strict=True):
            assert ours.masks.shape[0] == min(most, 24)
            assert ours.masks.size == tuple(masks.shape[1:])
            assert torch.equal(ours.labels, labels)
            torch.testing.assert_close(ours.scores, scores)
            dense = ours.masks.to_dense()
            union = (dense | masks).flatten(1).sum(1)
            iou = torch.where(union > 0, (dense & masks).flatten(1).sum(1) / union.clamp(min=1), 1)
            assert (iou[union > 100] > 0.95).all() and (dense != masks).float().mean() < 0.01


def test_ties_keep_the_order_of_kernels_and_classes() -> None:
    model = small(10)
    outputs = Outputs([torch.randn(1, 8, 12, 16)], [torch.zeros(1, 8, 3)], [], torch.zeros(1, 3, 12, 16))
    outputs.classes[0][0, 5, 1] = 1
    (found,) = model.predictions(outputs, SIZE, [SIZE], [SIZE], max_per_image=6)
    assert found.labels.tolist() == [1, 0, 1, 2, 0, 1]
    first = outputs.masks[0][0, [5, 0, 0, 0, 1, 1]]
    soft = torch.nn.functional.interpolate(first[None], scale_factor=2, mode="bilinear")[0].sigmoid()
    assert torch.equal(found.masks.words, sprompt.ops.resize_masks(soft, SIZE, threshold=0.5).words)
    assert all(len(p.scores) == 0 for p in model.predictions(outputs, SIZE, [SIZE], [SIZE], max_per_image=0))


def test_autocast() -> None:
    model = small(11)
    images, masks, labels, counts = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images)
        losses = model.losses(outputs, masks, labels, counts)
    assert outputs.masks[-1].dtype == torch.bfloat16 and outputs.kernels[-1].dtype == torch.float32
    assert all(term.dtype == torch.float32 and torch.isfinite(term) for term in losses.terms.values())
    sum(losses.terms.values()).backward()
    full = model(images)
    error = (outputs.masks[0].float() - full.masks[0]).norm() / full.masks[0].norm()
    assert error < 0.05


def test_tiny_trains() -> None:
    torch.manual_seed(0)
    config = KNetConfig(
        depth=18, backbone_width=8, frozen_stages=-1, channels=16, kernels=5, num_classes=3, heads=2, feedforward=32
    )
    model = KNet(config)
    images, masks, labels, counts = batch((2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    history = []
    for _ in range(8):
        loss = sum(model.losses(model(images), masks, labels, counts).terms.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.8 * history[0]


def test_new_classes() -> None:
    model = small(12)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reset_classifier(5)
    assert model.num_classes == 5 and isinstance(model, QueryModel)
    for name, tensor in model.state_dict().items():
        if "conv_seg" in name or "fc_cls" in name:
            assert tensor.shape[0] == 5
            if name.endswith("bias"):
                torch.testing.assert_close(tensor, torch.full((5,), -4.59512))
        else:
            assert torch.equal(tensor, before[name])
    assert model(batch()[0]).classes[-1].shape == (3, 8, 5)


def test_bad_arguments() -> None:
    model = small(13)
    images, masks, labels, counts = batch()
    with pytest.raises(ValueError, match=r"multiples of 32, got \(1, 3, 96, 100\)"):
        model.encode(torch.zeros(1, 3, 96, 100))
    outputs = model(images)
    with pytest.raises(ValueError, match="pad masks as the images are"):
        model.losses(outputs, BitMasks.from_dense(torch.zeros(3, 4, 96, 96)), labels, counts)
    with pytest.raises(
        ValueError, match="labels must lie between 0 and 2, got 3; was the model made for these classes"
    ):
        model.losses(outputs, masks, torch.full_like(labels, 3), counts)
    with pytest.raises(ValueError, match="labels must be int64"):
        model.losses(outputs, masks, labels.int(), counts)
    with pytest.raises(ValueError, match="counts must be int64 of shape"):
        model.losses(outputs, masks, labels, counts[:2])
    with pytest.raises(ValueError, match=r"input_size must be \(96, 128\)"):
        model.predictions(outputs, (128, 96), [SIZE] * 3, [SIZE] * 3)
    with pytest.raises(ValueError, match="one entry an image, 3, got 3 and 2"):
        model.predictions(outputs, SIZE, [SIZE] * 3, [SIZE] * 2)
    for change in (
        {"depth": 20},
        {"channels": 30},
        {"kernels": 0},
        {"stages": True},
        {"loss_dice": float("nan")},
        {"fold": 1},
    ):
        with pytest.raises(ValueError, match=f"KNetConfig: {next(iter(change))}"):
            replace(SMALL, **change)
