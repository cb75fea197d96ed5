"""QueryInst equals its literal implementation in float64, and keeps the promises of its docstrings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import queryinst_eager as eager
import torch
from torch import Tensor, nn

from sprompt.masks import BitMasks
from sprompt.models.protocol import Features, QueryGroup, Targets, checked_model
from sprompt.models.queryinst import QueryInst, QueryInstConfig
from sprompt.models.queryinst.heads import BatchNormOfReal
from sprompt.models.queryinst.model import Outputs
from sprompt.models.saved import load_model, save_model

TINY = QueryInstConfig(
    depth=18, backbone_width=8, channels=16, queries=6, stages=2, heads=4, dynamic_channels=5, feedforward=20, num_classes=3
)  # fmt: skip
Size = tuple[int, int]


def network(config: QueryInstConfig = TINY, seed: int = 0) -> QueryInst:
    """With norms that are not the identity, and boxes and classes that differ."""
    torch.manual_seed(seed)
    model = QueryInst(config)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 1.5)
        boxes = model.rpn_head.init_proposal_bboxes.weight
        boxes[:, :2].uniform_(0.3, 0.7)
        boxes[:, 2:].uniform_(0.2, 1.2)
        for head in model.roi_head.bbox_head:
            head.fc_reg.weight.mul_(0.3)
            head.fc_cls.weight.mul_(3)
            head.fc_cls.bias.add_(3)
    return model.eval()


def labelled(size: Size, counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Images, dense masks (B, G, H, W), none of them empty, and labels."""
    generator = torch.Generator().manual_seed(seed)
    most = max([*counts, 1])
    images = torch.randn(len(counts), 3, *size, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(counts), most, 4, 5, generator=generator, dtype=torch.float64)
    masks = nn.functional.interpolate(noise, size, mode="bilinear") > 0.6
    for target in range(most):  # tight boxes that differ, so that no two targets have the same costs
        masks[:, target, : 2 + 3 * target] = masks[:, target, :, size[1] - 4 * target :] = False
        masks[:, target, 2 + 3 * target : 30, 9:13] = masks[:, target, 29:40, 9 : size[1] - 4 * target] = True
    labels = torch.randint(0, 3, (len(counts), most), generator=generator)
    return images, masks, labels


CASES = {
    "one without targets": ((64, 96), [(64, 96), (50, 71)], [3, 0]),
    "more than queries": ((96, 64), [(90, 64), (96, 60)], [8, 2]),
    "one positive": ((64, 64), [(61, 64)], [1]),
    "no targets": ((64, 64), [(64, 64)], [0]),
}


@pytest.mark.parametrize(("size", "sizes", "counts"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("training", [True, False])
def test_outputs_losses_and_gradients(size: Size, sizes: list[Size], counts: list[int], training: bool) -> None:
    model = network().double().train(training)
    images, masks, labels = labelled(size, counts)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    w = {n: t.detach().clone().requires_grad_(n in names) for n, t in model.state_dict().items()}
    expected = [eager.forward(w, image, own, TINY.heads) for image, own in zip(images, sizes, strict=True)]
    outputs = model.decode(model.encode(images)._replace(sizes=sizes))
    for b, wanted in enumerate(expected):
        for found, own in zip(outputs.stages, wanted.stages, strict=True):
            for mine, theirs in zip(found, own, strict=True):
                close(mine[b], torch.stack(theirs))

    found = model.losses(outputs, BitMasks.from_dense(masks), labels, torch.tensor(counts))
    terms, matches = eager.losses(
        w, expected, [m[:n] for m, n in zip(masks, counts, strict=True)], [c[:n] for c, n in zip(labels, counts, strict=True)],
        sizes, training,
    )  # fmt: skip
    assert found.terms.keys() == terms.keys()
    for name, term in terms.items():
        close(found.terms[name], term)
    for (kernels, rows), stage, pairs_of in zip(found.matched, outputs.stages, matches, strict=True):
        assert kernels is stage.queries
        assert rows.tolist() == [
            [next((q for q, g in own.items() if g == target), -1) for target in range(rows.shape[1])]
            for own in pairs_of
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


@pytest.mark.parametrize("together", [32, 2])
def test_inference_equals_a_literal_paste(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two padded images have other sizes than their pictures. A batch gives what its images give one by one."""
    monkeypatch.setattr("sprompt.models.queryinst.inference._TOGETHER", together)
    model = network().double()
    images = labelled((64, 96), [1, 1])[0]
    sizes, originals = [(64, 90), (50, 96)], [(100, 61), (25, 48)]
    with torch.no_grad():
        features = model.encode(images)
        outputs = model.decode(features._replace(sizes=sizes))
        found = model.predictions(outputs, (64, 96), sizes, originals, max_per_image=7)
    for b, own in enumerate(found):
        expected = eager.forward(model.state_dict(), images[b], sizes[b], TINY.heads)
        results = eager.predictions(model.state_dict(), expected, sizes[b], originals[b], 7)
        assert own.masks.size == originals[b] and own.masks.area().gt(0).sum() >= 3
        assert own.labels.tolist() == [k for _, k, _ in results]
        close(own.scores, torch.tensor([s for s, _, _ in results]).float())
        for mask, (_, _, pixels) in zip(own.masks.to_dense(), results, strict=True):
            clear = abs(torch.from_numpy(pixels) - 0.5) > 1e-9
            assert torch.equal(mask[clear], (torch.from_numpy(pixels) > 0.5)[clear]) and clear.float().mean() > 0.99
        with torch.no_grad():
            alone = model.decode(Features([], [x[b : b + 1] for x in features.maps], sizes[b : b + 1]))
            (single,) = model.predictions(alone, (64, 96), sizes[b : b + 1], originals[b : b + 1], max_per_image=7)
        close(single.scores, own.scores)
        assert (
            torch.equal(single.labels, own.labels)
            and single.masks.iou(own.masks).diagonal()[own.masks.area() > 0].min() == 1
        )


def test_the_mask_head_runs_once_for_a_query(monkeypatch: pytest.MonkeyPatch) -> None:
    """18 pairs of 6 queries: 6 boxes, each with the rows of its own classes."""
    model = network()
    head = model.mask_heads[-1]
    calls = []
    forward = head.forward
    monkeypatch.setattr(head, "forward", lambda *given: calls.append(given) or forward(*given))
    with torch.no_grad():
        outputs = model(labelled((64, 64), [1])[0].float())
        model.predictions(outputs, (64, 64), [(64, 64)], [(64, 64)])
        model.predictions(outputs, (64, 64), [(64, 64)], [(64, 64)], max_per_image=1)
    assert [(len(given[0]), given[2].shape[1]) for given in calls] == [(6, 3), (1, 1)]


def test_the_map_of_a_query_is_its_mask() -> None:
    model = network()
    with torch.no_grad():
        outputs = model(labelled((64, 96), [1])[0].float())
        logits = model.mask_logits(outputs)
        (found,) = model.predictions(outputs, (64, 96), [(64, 96)], [(8, 12)], max_per_image=18)
    assert logits.shape == (1, 6, 8, 12)
    best = outputs.stages[-1].classes[0].argmax(1)
    scores = outputs.stages[-1].classes[0].sigmoid().flatten().sort(descending=True)
    for place, pair in enumerate(scores.indices.tolist()):
        if best[pair // 3] == pair % 3:
            assert torch.equal(found.masks[place].to_dense(), logits[0, pair // 3] > 0)


@pytest.mark.parametrize("number", [0, 1, 2, 5])
def test_batch_norm_of_real_samples(number: int) -> None:
    """Other samples have no influence; with fewer than two, the running statistics are used and stay."""
    torch.manual_seed(number)
    own, plain = BatchNormOfReal(4).double(), nn.BatchNorm2d(4).double()
    for module in (own, plain):
        with torch.no_grad():
            module.weight.copy_(torch.arange(1.0, 5))
            module.running_mean.fill_(0.3)
            module.running_var.fill_(2.0)
    x = torch.randn(7, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    real = torch.arange(7) % 7 < number
    found = own(x, real)[real]
    wanted = plain.train(number >= 2)(x[real])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    torch.testing.assert_close(
        *(torch.autograd.grad((y * weight).sum(), x)[0] for y in (found, wanted)), rtol=1e-12, atol=1e-12
    )
    found, wanted = own(x[real]), plain(x[real])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(own.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("marked", [True, False])
def test_batch_norm_of_one_sample_before_a_batch(marked: bool) -> None:
    """The gradient of the first sample is that of the statistics at its time."""
    norm = BatchNormOfReal(4).double()
    x, real = torch.randn(4, 4, 3, 2, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    first, _ = (norm(part, real[: len(part)] if marked else None) for part in (x[:1], x[1:] + 5))
    first.sum().backward()
    wanted = (x[:1] / (1 + norm.eps) ** 0.5).sum((0, 2, 3))  # mean 0, variance 1
    torch.testing.assert_close(norm.weight.grad, wanted, rtol=1e-12, atol=1e-12)


def test_batch_norm_of_a_network_in_few_bits() -> None:
    x = torch.randn(4, 4, 3, 2, dtype=torch.bfloat16)
    found, wanted = BatchNormOfReal(4).bfloat16()(x), nn.BatchNorm2d(4).double()(x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-2, atol=1e-2)


def test_pairs_without_a_query_count_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU computes all pairs of an image and a target, a CPU the matched ones."""
    model = network().double().train()
    images, masks, labels = labelled((96, 64), [8, 2])
    found = []
    for everywhere in (False, True):
        outputs = model(images)
        if everywhere:
            monkeypatch.setattr("sprompt.models.queryinst.loss._selects", lambda device: False)
        terms = model.losses(outputs, BitMasks.from_dense(masks), labels, torch.tensor([8, 2])).terms
        model.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        found.append((terms, {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}))
    for kind in range(2):
        for name, value in found[0][kind].items():
            torch.testing.assert_close(found[1][kind][name], value, rtol=1e-9, atol=1e-9)


def test_the_sizes_of_the_release() -> None:
    with torch.device("meta"):
        model = QueryInst()
    count = {
        part: sum(p.numel() for n, p in model.named_parameters() if n.startswith(part))
        for part in ("rpn_head.", "roi_head.bbox_head.0.", "roi_head.mask_head.0.", "roi_head.")
    }
    attention, ffn = 4 * 256 * 256 + 4 * 256, 2 * 256 * 2048 + 2048 + 256
    theta, norms = 32768 * 257, 2 * 64 + 2 * 256
    box = attention + theta + norms + 12544 * 256 + 256 + 4 * 512 + ffn + 4 * (65536 + 512) + 257 * 84
    mask = theta + norms + 4 * (256 * 256 * 9 + 3 * 256) + 256 * 256 * 4 + 256 + 257 * 80
    assert count == {
        "rpn_head.": 100 * 260, "roi_head.bbox_head.0.": box, "roi_head.mask_head.0.": mask, "roi_head.": 6 * (box + mask)
    }  # fmt: skip


@pytest.mark.parametrize("seed", [0, 1])
def test_float32_differs_by_rounding_only(seed: int) -> None:
    """Float32 runs on the compiled kernels, float64 on the reference. With these seeds no bit of a target lies at a half."""
    images, masks, labels = labelled((64, 96), [4, 2], seed)
    found = []
    for dtype in (torch.float32, torch.float64):
        model = network(seed=seed).to(dtype).train()
        terms = model.losses(model(images.to(dtype)), BitMasks.from_dense(masks), labels, torch.tensor([4, 2])).terms
        torch.stack(list(terms.values())).sum().backward()
        found.append((terms, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (terms, gradients), (wanted_terms, wanted_gradients) = found
    for name, wanted in wanted_terms.items():
        torch.testing.assert_close(terms[name].double(), wanted, rtol=1e-5, atol=0)
    largest = max(float(g.abs().max()) for g in wanted_gradients.values())
    for name, wanted in wanted_gradients.items():
        torch.testing.assert_close(
            gradients[name].double(), wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()) + 1e-6 * largest, msg=name
        )


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
    model = network()
    own = {p: (group.rate, group.decay) for group in model.parameter_groups() for p in group.parameters}
    for name, parameter in model.named_parameters():
        still = name.startswith(("backbone.conv1", "backbone.bn1", "backbone.layer1"))
        assert parameter.requires_grad == (not still), name
        assert own.get(parameter, (1.0, 1.0)) == (0.1 if name.startswith("backbone.") else 1.0, 1), name
    model.freeze_backbone(4)
    assert model.config.frozen_stages == 4 and not any(p.requires_grad for p in model.backbone.parameters())


def test_it_is_a_model(tmp_path: Path) -> None:
    model = checked_model(network())
    assert (model.num_queries, model.num_classes, model.channels, model.sites) == (6, 3, 16, ("query",))
    save_model(tmp_path / "model.safetensors", model, ["a", "b", "c"])
    loaded, about = load_model(tmp_path / "model.safetensors")
    assert about["model"] == "queryinst" and loaded.config == TINY
    images = labelled((64, 96), [1])[0].float()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    found, wanted = (m(images).stages[-1].classes for m in (loaded, model))
    # Torch's products round differently where weights lie elsewhere in memory.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    model.reset_classifier(5)
    assert model(images).stages[0].classes.shape == (1, 6, 5)
    assert all(head.conv_logits.weight.shape == (5, 16, 1, 1) for head in model.mask_heads)
    save_model(tmp_path / "model.safetensors", model, list("abcde"))
    assert load_model(tmp_path / "model.safetensors")[0].num_classes == 5


def test_prompts_change_the_content_and_no_box() -> None:
    model = network().double()
    images = labelled((64, 64), [1])[0]
    sites = []

    def prompter(site: str, queries: Tensor, given: Tensor | None = None) -> Tensor:
        sites.append((site, tuple(queries.shape), given))
        return queries + 0.5

    outputs = model.decode(model.encode(images), prompter)
    assert sites == [("query", (1, 6, 16), None)]
    expected = eager.forward(model.state_dict(), images[0], (64, 64), TINY.heads, 0.5)
    for found, own in zip(outputs.stages, expected.stages, strict=True):
        for mine, theirs in zip(found, own, strict=True):
            close(mine[0], torch.stack(theirs))
    with pytest.raises(ValueError, match=r"prompter must return queries of shape \(1, 6, 16\), got \(1, 5, 16\)"):
        model.decode(model.encode(images), lambda site, queries, given=None: queries[:, 1:])


def test_first_values() -> None:
    torch.manual_seed(0)
    model = QueryInst(TINY)
    assert model.rpn_head.init_proposal_bboxes.weight.tolist() == [[0.5, 0.5, 1.0, 1.0]] * 6
    assert abs(float(model.rpn_head.init_proposal_features.weight.detach().std()) - 1) < 0.2
    for name, p in model.roi_head.named_parameters():
        if name.endswith("fc_cls.bias"):
            torch.testing.assert_close(p.detach(), torch.full_like(p, -4.59511985))
        elif name.endswith("conv_logits.bias"):
            assert not p.any()
        elif p.dim() > 1:
            cells = p[0, 0].numel()
            bound = (6 / ((p.shape[0] + p.shape[1]) * cells)) ** 0.5
            assert 0.8 * bound < p.abs().max() <= bound, name


def test_an_inverted_learned_box_has_no_size() -> None:
    model = network()
    with torch.no_grad():
        model.rpn_head.init_proposal_bboxes.weight[:, 2:] = -1
    images, masks, labels = labelled((64, 64), [2])
    outputs = model(images.float())
    assert all(stage.boxes.isfinite().all() and stage.classes.isfinite().all() for stage in outputs.stages)
    terms = model.losses(outputs, BitMasks.from_dense(masks), labels, torch.tensor([2])).terms
    assert all(term.isfinite() for term in terms.values())
    (found,) = model.predictions(outputs, (64, 64), [(64, 64)], [(64, 64)])
    assert not found.masks.area().any()


def test_what_it_refuses() -> None:
    model = network()
    with pytest.raises(ValueError, match="multiples of 32"):
        model(torch.zeros(1, 3, 100, 96))
    features = model.encode(torch.zeros(1, 3, 64, 64))
    masks = BitMasks.from_dense(torch.zeros(1, 1, 64, 64))
    none, one = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([1])
    groups = [QueryGroup(torch.zeros(1, 1, 16), None, torch.ones(1, 7, dtype=torch.bool))]
    with pytest.raises(ValueError, match="groups must be empty"):
        model.decode(features, None, Targets(masks, none, one, groups))
    with pytest.raises(ValueError, match="sizes must have one entry an image, 1, got 2"):
        model.decode(features._replace(sizes=[(64, 64)] * 2))
    outputs: Outputs = model.decode(features)
    with pytest.raises(ValueError, match=r"the size of the images, \(64, 64\), got \(1, 1\) and \(32, 64\)"):
        model.losses(outputs, BitMasks.from_dense(torch.zeros(1, 1, 32, 64)), none, one)
    with pytest.raises(ValueError, match="labels must be int64"):
        model.losses(outputs, masks, none.float(), one)
    with pytest.raises(ValueError, match="labels must lie between 0 and 2, got 3"):
        model.losses(outputs, masks, none + 3, one)
    with pytest.raises(ValueError, match="one entry an image, 1, got 2 and 1"):
        model.predictions(outputs, (64, 64), [(64, 64)] * 2, [(64, 64)])
    for field, value in {"channels": 18, "queries": 0, "stages": 65, "depth": 20, "loss_giou": -1.0}.items():
        with pytest.raises(ValueError, match=f"QueryInstConfig: {field} must"):
            replace(TINY, **{field: value})


@torch.no_grad()
@pytest.mark.parametrize("form", ["exported", "compiled"])
def test_the_network_is_one_graph(form: str) -> None:
    """One exported program takes batches and images of any size. Results differ by rounding: outside of programs, torch's attention
    has a kernel of its own for inference."""
    model = network().double()
    g = torch.Generator().manual_seed(4)
    images = torch.randn(3, 3, 64, 96, generator=g, dtype=torch.float64)
    if form == "exported":
        shape = {0: torch.export.Dim("batch"), 2: 32 * torch.export.Dim("rows"), 3: 32 * torch.export.Dim("columns")}
        forward = torch.export.export(model, (images,), dynamic_shapes=(shape,)).module()
    else:
        forward = torch.compile(model, fullgraph=True, backend="eager")
    for batch in (images, torch.randn(1, 3, 128, 64, generator=g, dtype=torch.float64)):
        for found, expected in zip(forward(batch).stages, model(batch).stages, strict=True):
            for mine, theirs in zip(found, expected, strict=True):
                close(mine, theirs)
