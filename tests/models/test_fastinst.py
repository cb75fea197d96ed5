"""FastInst equals its literal implementation in float64, and keeps the promises of its specification."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import fastinst_eager as eager
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sprompt.masks import BitMasks
from sprompt.models.fastinst import FastInst, FastInstConfig
from sprompt.models.fastinst.loss import Points, _located, guiding, losses
from sprompt.models.fastinst.model import Outputs
from sprompt.models.protocol import QueryGroup, Targets, checked_model
from sprompt.models.saved import load_model, save_model
from sprompt.nn.dual_path import everywhere
from sprompt.ops import activation_queries

TINY = FastInstConfig(
    depth=18, backbone_width=8, channels=32, queries=7, auxiliary_queries=3, heads=4, decoder_layers=2, decoder_feedforward=40,
    points=60, num_classes=3,
)  # fmt: skip


def network(config: FastInstConfig = TINY, seed: int = 0) -> FastInst:
    """With norms that are not the identity, and positions and class logits of some size."""
    torch.manual_seed(seed)
    model = FastInst(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
        model.positions.normal_()
        model.proposal_predictor[2].weight.mul_(8)
    return model.eval()


def labelled(size: tuple[int, int], counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, dense masks (B, G, H, W) of which the first of every image is empty and the second tiny, and labels."""
    generator = torch.Generator().manual_seed(seed)
    most = max([*counts, 1])
    images = torch.randn(len(counts), 3, *size, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(counts), most, 4, 5, generator=generator, dtype=torch.float64)
    masks = nn.functional.interpolate(noise, size, mode="bilinear") > 0.4
    masks[:, 0] = False
    if most > 1:
        masks[:, 1] = False
        masks[:, 1, 13:15, 21:23] = True  # has no pixel at stride 8
    labels = torch.randint(0, 3, (len(counts), most), generator=generator)
    labels[:, :1], labels[:, 1:2] = 0, 1  # so that no two targets have the same costs
    return images, masks, labels


@pytest.mark.parametrize(
    ("size", "counts", "layers"),
    [((64, 96), [4, 0], 2), ((96, 64), [9, 2], 2), ((64, 64), [3], 1)],
    ids=["one without targets", "more than queries", "one layer"],
)
def test_predictions_losses_and_gradients(size: tuple[int, int], counts: list[int], layers: int) -> None:
    config = replace(TINY, decoder_layers=layers)
    model = network(config).double()
    images, masks, labels = labelled(size, counts)
    generator = torch.Generator().manual_seed(1)
    pairs = [min(n, config.queries) for n in counts]

    def points(*shape: int) -> Tensor:
        return torch.rand(*shape, 2, generator=generator, dtype=torch.float64)

    cost = [points(len(counts), config.points) for _ in range(layers + 1)]
    candidates = [points(sum(pairs), 3 * config.points + config.points // 4) for _ in range(2 * layers + 1)]
    given = Points(points(len(counts), 4), cost, candidates)  # so few that they match other pairs

    names = {name for name, p in model.named_parameters() if p.requires_grad}
    w = {n: t.detach().clone().requires_grad_(n in names) for n, t in model.state_dict().items()}
    expected = [eager.forward(w, image, config.queries, config.heads) for image in images]
    outputs = model(images)
    predicted = outputs.decoded.predicted
    assert len(predicted) == layers + 1
    for b, wanted in enumerate(expected):
        close(outputs.proposals[b], wanted.proposals)
        close(outputs.locations[b], torch.tensor(wanted.locations, dtype=torch.float64))
        close(outputs.classes[b], wanted.classes[-1])
        for k, found in enumerate(predicted):
            close(model.decoder.classes(k, found.hidden)[b], wanted.classes[k])
            close(torch.einsum("qc,chw->qhw", found.embeddings[b], found.features[b]), wanted.masks[k])
        assert all(((m > 0).any() and (m < 0).any()) for m in wanted.masks)
    close(model.mask_logits(outputs), torch.stack([o.masks[-1] for o in expected]))

    found = losses(outputs, BitMasks.from_dense(masks), labels, torch.tensor(counts), config, model.decoder, given)
    terms, matches = eager.losses(
        w, expected, [m[:n].double() for m, n in zip(masks, counts, strict=True)], [c[:n] for c, n in zip(labels, counts, strict=True)],
        given.guide, cost, [c.split(pairs) for c in candidates], config.points, config.heads,
    )  # fmt: skip
    assert found.terms.keys() == terms.keys() and len(found.matched) == layers
    for name, term in terms.items():
        close(found.terms[name], term)
    assert matches[-1] != matches[-2]
    for (kernels, rows), queries, pairs_of in zip(
        found.matched, outputs.decoded.queries[1:], matches[1:-1], strict=True
    ):
        assert torch.equal(kernels, queries[:, : config.queries])
        assert rows.tolist() == [
            [next((q for q, g in own.items() if g == target), -1) for target in range(max(counts))] for own in pairs_of
        ]
    torch.stack(list(found.terms.values())).sum().backward()
    torch.stack(list(terms.values())).sum().backward()
    for name, parameter in model.named_parameters():
        if name in names:
            wanted = torch.zeros_like(parameter) if w[name].grad is None else w[name].grad
            scale = max(1.0, float(wanted.abs().max()))
            torch.testing.assert_close(
                parameter.grad, wanted, rtol=0, atol=1e-9 * scale, msg=lambda m, n=name: f"{n}: {m}"
            )


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("layers", "number"), [(1, 6_203_123), (3, 10_721_685)])
def test_the_sizes_of_the_release(layers: int, number: int) -> None:
    """The whole model is of 30 and 34 million parameters, with a deformable ResNet-D of 30 and 35."""
    with torch.device("meta"):
        model = FastInst(FastInstConfig(decoder_layers=layers))
    assert sum(p.numel() for n, p in model.named_parameters() if not n.startswith("backbone.")) == number
    convolutions = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.weight.numel() for m in convolutions) == 23_454_912
    with torch.device("meta"):
        model = FastInst(FastInstConfig(decoder_layers=layers, backbone_variant="d-dcn"))
    assert sum(p.numel() for p in model.parameters()) == number + 24_025_090


def test_the_queries_of_a_picture_of_coco() -> None:
    """80 classes on 40×54 cells have more than 100 local maxima, which become the queries."""
    logits = torch.randn(81, 40, 54, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    index, scores, labels = activation_queries(logits[None].float(), 100)
    assert index[0].tolist() == eager.chosen(logits, 100)
    p = logits.softmax(0)[:80]
    volume = p * (p == p.amax(0))
    peaks = ((nn.functional.max_pool2d(volume, 3, 1, 1) == volume) & (volume >= 1e-6)).any(0)
    assert peaks.sum() >= 100 and peaks.flatten()[index[0]].all()
    torch.testing.assert_close(scores[0].double(), p.amax(0).flatten()[index[0]], rtol=1e-5, atol=0)
    assert torch.equal(labels[0], p.argmax(0).flatten()[index[0]])


def test_a_picture_of_odd_size() -> None:
    """600×801 pixels, padded. The masks of the result equal those of two dense resizes, and every score is that of its pair."""
    model = network()
    images = torch.randn(1, 3, 608, 832, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = model.encode(images)
        outputs = model.decode(features)
    assert [tuple(m.shape[2:]) for m in features.maps] == [(76, 104), (76, 104), (38, 52), (19, 26)]
    logits = model.mask_logits(outputs)
    assert logits.shape == (1, 7, 76, 104)
    (found,) = model.predictions(outputs, (608, 832), [(600, 801)], [(300, 411)], max_per_image=9)
    padded = nn.functional.interpolate(logits.double(), (608, 832), mode="bilinear", align_corners=False)
    pixels = nn.functional.interpolate(padded[..., :600, :801], (300, 411), mode="bilinear", align_corners=False)[
        0
    ].sigmoid()
    quality = (pixels * (pixels > 0.5)).sum((1, 2)) / ((pixels > 0.5).sum((1, 2)) + 1e-6)
    pairs = outputs.classes[0].double().softmax(1)[:, :-1].flatten().topk(9)
    scores, order = (pairs.values * quality[pairs.indices // 3]).sort(descending=True)
    torch.testing.assert_close(found.scores.double(), scores, rtol=0, atol=1e-4)
    assert torch.equal(found.labels, (pairs.indices % 3)[order])
    wanted = BitMasks.from_dense(pixels[(pairs.indices // 3)[order]])
    assert found.masks.iou(wanted).diagonal()[wanted.area() > 0].min() >= 0.999


def test_a_query_with_an_empty_mask_attends_everywhere() -> None:
    """All logits below 0 act like all logits above 0, in every layer and in the guided pass."""
    model = network().double()
    features = model.encode(labelled((64, 64), [1])[0])

    def with_logits(sign: float) -> Tensor:
        for head in model.decoder.heads[:-1]:
            nn.init.zeros_(head.mask_features.weight)
            nn.init.ones_(head.mask_features.bias)
            nn.init.zeros_(head.mask_predictor[2][0].weight)
            nn.init.constant_(head.mask_predictor[2][0].bias, sign)
        return model.decode(features).classes

    assert torch.equal(with_logits(-1), with_logits(1))
    decoded = model.decode(features).decoded
    again = model.decoder.again(decoded, everywhere(BitMasks.from_dense(torch.zeros(1, 8, 8)[:, None]), 10))
    full = BitMasks.from_dense(torch.ones(1, 10, 8, 8))
    for k, found in enumerate(again):
        state = decoded.queries[k + 1], decoded.query_positions, decoded.pixels[k + 1], decoded.pixel_positions
        queries, pixels = model.decoder.layers[k](*state, full)
        wanted = model.decoder.heads[k + 1](queries[:, :7], pixels, (8, 8))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_pixels_read_the_auxiliary_queries_which_predict_nothing() -> None:
    model = network()
    images = labelled((64, 64), [1])[0].float()
    before = model(images)
    assert before.decoded.queries[-1].shape[1] == 10 and before.classes.shape == (1, 7, 4)
    with torch.no_grad():
        model.auxiliary_content.weight.add_(1)
    after = model(images)
    assert torch.equal(before.decoded.pixels[0], after.decoded.pixels[0])
    assert not torch.allclose(before.decoded.pixels[1], after.decoded.pixels[1])
    without = network(replace(TINY, auxiliary_queries=0))
    assert without(images).decoded.queries[-1].shape[1] == 7


def test_the_cost_of_locations() -> None:
    """A cost outside and a reward inside give the same assignment, also with more targets than queries."""
    generator = torch.Generator().manual_seed(0)
    for queries, targets in ((9, 4), (4, 9)):
        for _ in range(20):
            cost = torch.rand(queries, targets, generator=generator)
            outside = torch.rand(queries, targets, generator=generator) > 0.3
            own = linear_sum_assignment(_located(cost, outside, TINY))
            other = linear_sum_assignment(cost.double() - 1000 * ~outside)
            assert [list(part) for part in own] == [list(part) for part in other]


def test_guiding_masks() -> None:
    masks = torch.zeros(2, 3, 16, 16)
    masks[0, 0, :8], masks[0, 1, 3, 3], masks[1, 2, :, 8:] = 1, 1, 1
    found = guiding(BitMasks.from_dense(masks), torch.tensor([[2, 0, -1], [-1, -1, 1]]), 4, (2, 2)).to_dense()
    assert found.shape == (2, 4, 2, 2) and found.sum() == 4
    assert found[0, 2].tolist() == [[True, True], [False, False]]  # a target of one pixel that vanishes: everywhere
    assert found[1, 1].tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("seed", [0, 1])
def test_float32_differs_by_rounding_only(seed: int) -> None:
    """Float32 runs on the compiled kernels, float64 on the reference. With these seeds no bit of a mask lies at a logit of 0."""
    images, masks, labels = labelled((64, 96), [4, 2], seed)
    generator = torch.Generator().manual_seed(seed)

    def points(*shape: int) -> Tensor:
        return torch.rand(*shape, 2, generator=generator, dtype=torch.float64)

    given = Points(points(2, 60), [points(2, 60) for _ in range(3)], [points(6, 195) for _ in range(5)])
    found = []
    for dtype in (torch.float32, torch.float64):
        model = network(seed=seed).to(dtype)
        outputs = model(images.to(dtype))
        terms = losses(
            outputs, BitMasks.from_dense(masks), labels, torch.tensor([4, 2]), TINY, model.decoder, given
        ).terms
        torch.stack(list(terms.values())).sum().backward()
        found.append((terms, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (terms, gradients), (wanted_terms, wanted_gradients) = found
    for name, wanted in wanted_terms.items():
        torch.testing.assert_close(terms[name].double(), wanted, rtol=1e-5, atol=0)
    for name, wanted in wanted_gradients.items():
        if "k_proj.bias" not in name:  # a bias of all keys has no gradient but rounding
            scale = float(wanted.abs().max())
            torch.testing.assert_close(gradients[name].double(), wanted, rtol=0, atol=1e-4 * scale)


def test_what_can_be_left_out_for_comparison() -> None:
    """The guided pass adds terms and changes no other. Learned queries are the same for all images; the proposals are trained as before."""
    images, masks, labels = labelled((64, 96), [4, 2])
    generator = torch.Generator().manual_seed(2)
    points = [torch.rand(2, 60, 2, generator=generator) for _ in range(3)]
    given = Points(points[0], points, [torch.rand(6, 195, 2, generator=generator) for _ in range(5)])
    target = BitMasks.from_dense(masks), labels, torch.tensor([4, 2])
    model = network()
    outputs = model(images.float())
    with_guide, without = (
        losses(outputs, *target, replace(TINY, guided=guided), model.decoder, given).terms for guided in (True, False)
    )
    assert with_guide.keys() - without.keys() == {f"guided{k}/{t}" for k in (1, 2) for t in ("class", "mask", "dice")}
    assert all(torch.equal(term, with_guide[name]) for name, term in without.items())

    model = network(replace(TINY, selection="learned"))
    outputs = model(images.float())
    assert outputs.locations is None
    for state, tables in (
        (outputs.decoded.queries[0], (model.query_content, model.auxiliary_content)),
        (outputs.decoded.query_positions, (model.query_positions, model.auxiliary_positions)),
    ):
        assert torch.equal(state, torch.cat([table.weight for table in tables]).expand(2, -1, -1))
    found = losses(outputs, *target, model.config, model.decoder, given)
    assert found.terms.keys() == with_guide.keys()
    torch.stack(list(found.terms.values())).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in (model.query_content.weight, model.query_positions.weight))
    names = {p: n for n, p in model.named_parameters()}
    still = {names[p] for p in model.parameter_groups()[0].parameters}
    assert {"query_content.weight", "query_positions.weight"} <= still and "positions" not in still


@pytest.mark.parametrize("counts", [[2, 1], [0, 0]])
def test_losses_under_autocast(counts: list[int]) -> None:
    model = network().train()
    images, masks, labels = labelled((64, 64), [3, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.losses(model(images.float()), BitMasks.from_dense(masks), labels, torch.tensor(counts))
    assert all(term.dtype == torch.float32 and term.isfinite() for term in found.terms.values())
    torch.stack(list(found.terms.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name


def test_what_is_trained_and_how() -> None:
    model = network(replace(TINY, frozen_stages=-1))
    own = {p: (group.rate, group.decay) for group in model.parameter_groups() for p in group.parameters}
    for name, parameter in model.named_parameters():
        norm = ".bn" in name or ".downsample.1." in name
        assert parameter.requires_grad == (not norm), name
        rate, decay = own.get(parameter, (1.0, 1.0))
        still = "layer_norm" in name or ".gn." in name or name.startswith("auxiliary")
        assert (rate, decay) == (0.1 if name.startswith("backbone.") else 1.0, 0 if still else 1), name
    model.freeze_backbone(4)
    assert model.config.frozen_stages == 4 and not any(p.requires_grad for p in model.backbone.parameters())


def test_it_is_a_model(tmp_path: Path) -> None:
    model = checked_model(network())
    assert (model.num_queries, model.num_classes, model.channels, model.sites) == (7, 3, 32, ("query",))
    save_model(tmp_path / "model.safetensors", model, ["a", "b", "c"])
    loaded, about = load_model(tmp_path / "model.safetensors")
    assert about["model"] == "fastinst" and loaded.config == TINY
    images = labelled((64, 96), [1])[0].float()
    assert torch.equal(loaded(images).classes, model(images).classes)
    model.reset_classifier(5)
    outputs = model(images)
    assert outputs.classes.shape == (1, 7, 6) and outputs.proposals.shape == (1, 6, 4, 6)
    save_model(tmp_path / "model.safetensors", model, list("abcde"))
    assert load_model(tmp_path / "model.safetensors")[0].num_classes == 5


def test_prompts_change_the_queries_of_cells() -> None:
    model = network()
    features = model.encode(labelled((64, 64), [1])[0].float())
    sites = []

    def prompter(site: str, queries: Tensor, given: Tensor | None = None) -> Tensor:
        sites.append((site, tuple(queries.shape), given))
        return queries + 1

    outputs, plain = model.decode(features, prompter), model.decode(features)
    assert sites == [("query", (1, 7, 32), None)]
    change = outputs.decoded.queries[0] - plain.decoded.queries[0]
    torch.testing.assert_close(change[:, :7], torch.ones(1, 7, 32))
    assert not change[:, 7:].any() and torch.equal(outputs.decoded.query_positions, plain.decoded.query_positions)
    with pytest.raises(ValueError, match=r"prompter must return queries of shape \(1, 7, 32\), got \(1, 6, 32\)"):
        model.decode(features, lambda site, queries, given=None: queries[:, 1:])


def test_what_it_refuses() -> None:
    model = network()
    with pytest.raises(
        ValueError, match=r"a cell of 16x16 pixels for each of the 7 queries, got 4 cells in images of 32x32"
    ):
        model(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.zeros(1, 3, 100, 96))
    masks = BitMasks.from_dense(torch.zeros(1, 1, 64, 64))
    groups = [QueryGroup(torch.zeros(1, 1, 32), None, torch.ones(1, 8, dtype=torch.bool))]
    targets = Targets(masks, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1]), groups)
    with pytest.raises(ValueError, match=r"targets\.groups must be empty"):
        model.decode(model.encode(torch.zeros(1, 3, 64, 64)), None, targets)
    for name, value, message in (
        ("depth", 19, "depth must be one of 18, 34, 50, 101, got 19"),
        ("channels", 30, "channels must be a multiple of 4 and of heads = 4, got 30"),
        ("auxiliary_queries", -1, "auxiliary_queries must be a whole number from 0 to 100000, got -1"),
        ("backbone_variant", "c", "backbone_variant must be one of 'plain', 'd', 'd-dcn', got 'c'"),
        ("guided", 1, "guided must be True or False, got 1"),
        ("selection", "any", "selection must be one of 'activation', 'learned', got 'any'"),
        ("cost_location", -1.0, "cost_location must be a number of at least 0, got -1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(TINY, **{name: value})


@torch.no_grad()
@pytest.mark.parametrize("form", ["exported", "compiled"])
def test_the_network_is_one_graph(form: str) -> None:
    """The program gives the same bits; the exported one has deformable convolutions. Other weights of the compiled module count at once."""
    model = network(replace(TINY, depth=50, backbone_variant="d-dcn") if form == "exported" else TINY)
    images, others = torch.randn(2, 2, 3, 64, 96, generator=torch.Generator().manual_seed(4))
    expected = model(others)
    if form == "exported":
        program = torch.export.export(model, (images,))
        assert {node.target for node in program.graph.nodes if "sprompt" in str(node.target)} == {
            getattr(torch.ops.sprompt, name).default
            for name in ("activation_queries", "deform_attn", "mask_attention", "mask_bits")
        }
        forward = program.module()
    else:
        forward = torch.compile(model, fullgraph=True, backend="eager")
        forward(images)
    assert_same(forward(others), expected)
    if form == "compiled":
        model.positions.add_(1)
        assert_same(forward(others), model(others))
        assert not torch.equal(model(others).classes, expected.classes)


def assert_same(found: Outputs, wanted: Outputs) -> None:
    pairs = list(zip(tree_leaves(found), tree_leaves(wanted), strict=True))
    assert len(pairs) > 10 and all(torch.equal(a, b) for a, b in pairs)
