"""Mask2Former equals transformers' class: predictions, losses and gradients, with its weights and its draws; its files in and out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sprompt
from sprompt.masks import BitMasks
from sprompt.models.mask2former import Mask2Former, Mask2FormerConfig
from sprompt.models.mask2former.checkpoint import export_checkpoint, import_checkpoint, to_transformers
from sprompt.models.mask2former.inference import predictions
from sprompt.models.mask2former.loss import Points, losses
from sprompt.models.saved import load_model, save_model
from sprompt.nn.tensor_files import read_tensors, write_tensors

transformers = pytest.importorskip("transformers", reason="the independent truth of these tests")

TINY = Mask2FormerConfig(
    depth=18, backbone_width=8, channels=32, queries=7, heads=4, encoder_layers=2, encoder_feedforward=40, decoder_layers=4,
    decoder_feedforward=48, points=60, num_classes=3,
)  # fmt: skip


def theirs(config: Mask2FormerConfig = TINY, seed: int = 0) -> nn.Module:
    """transformers' model of these sizes, with random weights and batch norm statistics."""
    width = config.backbone_width
    backbone = transformers.ResNetConfig(
        embedding_size=width, hidden_sizes=[width * s for s in (1, 2, 4, 8)], depths=[2, 2, 2, 2], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Mask2FormerForUniversalSegmentation(
        transformers.Mask2FormerConfig(
            backbone_config=backbone, num_labels=config.num_classes, num_queries=config.queries, feature_size=config.channels,
            mask_feature_size=config.channels, hidden_dim=config.channels, num_attention_heads=config.heads,
            encoder_layers=config.encoder_layers, encoder_feedforward_dim=config.encoder_feedforward,
            decoder_layers=config.decoder_layers + 1, dim_feedforward=config.decoder_feedforward, train_num_points=config.points,
        )
    )  # fmt: skip
    model.criterion.matcher.cost_class = config.cost_class  # several versions of transformers have 1 here
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.running_var.uniform_(0.5, 1.5)
            if hasattr(module, "sampling_offsets"):
                module.sampling_offsets.weight.normal_(std=0.5)
                module.attention_weights.weight.normal_(std=0.5)
    return model.eval()


def ours(other: nn.Module, tmp_path: Path, config: Mask2FormerConfig = TINY) -> Mask2Former:
    """Our model with the weights of theirs, by way of a file."""
    write_tensors(tmp_path / "theirs.safetensors", other.state_dict())
    model = Mask2Former(config)
    said = import_checkpoint(model, tmp_path / "theirs.safetensors")
    assert "as transformers names them" in said and "starts anew" not in said
    return model.eval()


def labelled(size: tuple[int, int], counts: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images, dense masks (B, G, H, W) that overlap and have holes, labels, counts."""
    generator = torch.Generator().manual_seed(seed)
    most = max([*counts, 1])
    images = torch.randn(len(counts), 3, *size, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(counts), most, 6, 8, generator=generator, dtype=torch.float64)
    masks = nn.functional.interpolate(noise, size, mode="bilinear") > 0.3
    labels = torch.randint(0, 3, (len(counts), most), generator=generator)
    return images, masks, labels, torch.tensor(counts)


class Draws:
    """Records what transformers draws and matches: the points of every call of its matcher, and of its loss."""

    def __init__(self, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        self.drawn: list[Tensor] = []
        self.pairs: list[list[tuple[Tensor, Tensor]]] = []
        self.starts: list[int] = []
        rand = torch.rand

        def recorded(*args: Any, **kwargs: Any) -> Tensor:
            self.drawn.append(rand(*args, **{**kwargs, "dtype": torch.float64}))
            return self.drawn[-1]

        def matched(module: nn.Module, args: Any, found: Any) -> None:
            self.pairs.append([(i.clone(), j.clone()) for i, j in found])
            self.starts.append(len(self.drawn))

        monkeypatch.setattr(torch, "rand", recorded)
        model.criterion.matcher.register_forward_hook(matched)  # type: ignore[union-attr, operator]

    def points(self, batch: int) -> Points:
        """In our order: transformers matches the last head first, and lists pairs by query; we list them by target."""
        cost, candidates = [], []
        for start, pairs in zip(self.starts, self.pairs, strict=True):
            cost.append(torch.cat([p.reshape(1, -1, 2) for p in self.drawn[start - batch : start]]))
            own = torch.cat(self.drawn[start : start + 2], 1) if len(pairs) else torch.empty(0)
            first, order = 0, []
            for _, targets in pairs:
                order += [first + int(k) for k in targets.argsort()]
                first += len(targets)
            candidates.append(own[order])
        head = [*range(1, len(cost)), 0]
        return Points([cost[h] for h in head], [candidates[h] for h in head])


@pytest.mark.parametrize(
    ("size", "counts"),
    [((64, 96), [3, 0]), ((96, 64), [9, 2]), ((64, 64), [4, 1])],
    ids=["one without targets", "more than queries", "square"],
)
def test_predictions_losses_and_gradients(
    size: tuple[int, int], counts: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = theirs()
    model = ours(other, tmp_path).double()
    other = other.double()
    other.criterion.empty_weight[-1] = TINY.no_object  # rounded to float32 before
    images, masks, labels, number = labelled(size, counts)
    draws = Draws(other, monkeypatch)
    expected = other(
        images, mask_labels=[m[:n].double() for m, n in zip(masks, counts, strict=True)],
        class_labels=[c[:n] for c, n in zip(labels, counts, strict=True)], output_auxiliary_logits=True, output_hidden_states=True,
    )  # fmt: skip
    monkeypatch.undo()
    outputs = model(images)
    theirs_masks = [*(a["masks_queries_logits"] for a in expected.auxiliary_logits), expected.masks_queries_logits]
    theirs_classes = [*(a["class_queries_logits"] for a in expected.auxiliary_logits), expected.class_queries_logits]
    assert len(outputs.classes) == len(theirs_classes) == TINY.decoder_layers + 1
    for own, wanted in zip(outputs.classes, theirs_classes, strict=True):
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9)
    for embedding, wanted in zip(outputs.embeddings, theirs_masks, strict=True):
        own = torch.einsum("bqc,bchw->bqhw", embedding, outputs.mask_features)
        torch.testing.assert_close(own, wanted, rtol=1e-9, atol=1e-9)

    found = losses(outputs, BitMasks.from_dense(masks), labels, number, TINY, draws.points(len(counts)))
    total = torch.stack(list(found.terms.values())).sum()
    torch.testing.assert_close(total, expected.loss.squeeze(), rtol=1e-9, atol=1e-9)
    total.backward()
    expected.loss.backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in model.named_parameters():
        wanted = gradients[to_transformers(name)]
        if parameter.requires_grad and wanted is not None:
            scale = float(wanted.abs().max()) + 1e-12
            torch.testing.assert_close(
                parameter.grad, wanted, rtol=0, atol=1e-9 * max(scale, 1.0), msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("threshold", (0.5, 0.3))
def test_inference_equals_two_dense_resizes(threshold: float) -> None:
    """A picture of odd sizes, padded: logits are resized to the padded input, cut to the image and resized to the picture, all
    as float pictures in float64."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features, embeddings, classes = normal(2, 16, 24, 32), normal(2, 9, 16) / 4, 2 * normal(2, 9, 4)
    input_size, sizes, originals = (96, 128), [(91, 117), (96, 83)], [(133, 171), (57, 49)]
    found = predictions(features, embeddings, classes, input_size, sizes, originals, threshold, 12)
    for image, prediction in enumerate(found):
        logits = torch.einsum("qc,chw->qhw", embeddings[image].double(), features[image].double())[None]
        padded = nn.functional.interpolate(logits, input_size, mode="bilinear", align_corners=False)
        cut = padded[..., : sizes[image][0], : sizes[image][1]]
        pixels = nn.functional.interpolate(cut, originals[image], mode="bilinear", align_corners=False)[0].sigmoid()
        quality = (pixels * (pixels > threshold)).sum((1, 2)) / ((pixels > threshold).sum((1, 2)) + 1e-6)
        pairs = classes[image].double().softmax(-1)[:, :3].flatten().topk(12)
        scores, order = (pairs.values * quality[pairs.indices // 3]).sort(descending=True)
        torch.testing.assert_close(prediction.scores.double(), scores, rtol=1e-4, atol=0)
        assert torch.equal(prediction.labels, (pairs.indices % 3)[order])
        own = pixels[(pairs.indices // 3)[order]]
        off = prediction.masks.to_dense() != (own > threshold)
        assert prediction.masks.size == originals[image] and ((own[off] - threshold).abs() < 1e-5).all()


def test_float32_differs_by_rounding_only(tmp_path: Path) -> None:
    other = theirs(seed=3)
    model = ours(other, tmp_path)
    images = labelled((64, 96), [1, 1])[0].float()
    with torch.no_grad():
        outputs, expected = model(images), other(images)
    masks = torch.einsum("bqc,bchw->bqhw", outputs.embeddings[-1], outputs.mask_features)
    for own, wanted in ((outputs.classes[-1], expected.class_queries_logits), (masks, expected.masks_queries_logits)):
        assert float((own - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


def test_files_go_there_and_back(tmp_path: Path) -> None:
    other = theirs()
    model = ours(other, tmp_path)
    export_checkpoint(model, tmp_path / "ours.safetensors")
    tensors, _ = read_tensors(tmp_path / "ours.safetensors")
    wanted = other.state_dict()
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors.items())
    save_model(tmp_path / "model.safetensors", model, ["a", "b", "c"])
    loaded, about = load_model(tmp_path / "model.safetensors")
    assert about["model"] == "mask2former" and loaded.config == TINY
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())


def test_another_number_of_classes_starts_the_classifier_anew(tmp_path: Path) -> None:
    other = theirs()
    write_tensors(tmp_path / "theirs.safetensors", other.state_dict())
    model = Mask2Former(Mask2FormerConfig(**{**TINY.__dict__, "num_classes": 5}))
    assert "the file has 3 classes and the model 5" in import_checkpoint(model, tmp_path / "theirs.safetensors")
    assert model.class_predictor.weight.shape == (6, 32)
    tensors = dict(other.state_dict())
    del tensors["model.transformer_module.level_embed.weight"]
    write_tensors(tmp_path / "broken.safetensors", tensors)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing: transformer_module\.level_embed\.weight"):
        import_checkpoint(model, tmp_path / "broken.safetensors")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_sizes_of_the_release() -> None:
    with torch.device("meta"):
        model = Mask2Former(Mask2FormerConfig(num_classes=1))
    assert sum(p.numel() for p in model.backbone.parameters()) == 23_508_032
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 44.0
    groups = model.parameter_groups()
    assert {group.decay for group in groups} == {0, 1.0} and groups[1].rate == 0.1


def test_a_folder_of_transformers_is_loaded_by_its_name(tmp_path: Path) -> None:
    other = theirs()
    other.save_pretrained(tmp_path)
    trained = sprompt.load(tmp_path, model="mask2former", device="cpu")
    assert trained.model.config == replace(Mask2FormerConfig(), **{**TINY.__dict__})
    wanted = other.state_dict()
    assert all(torch.equal(t, wanted[to_transformers(n)]) for n, t in trained.model.state_dict().items())
    found = trained.predict(torch.rand(3, 50, 70), short=64, long=96)
    assert found.masks.size == (50, 70) and len(found) <= 100
    about = json.loads((tmp_path / "config.json").read_text())
    about["backbone_config"]["model_type"] = "swin"
    (tmp_path / "config.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="the backbone must be a ResNet, got 'swin'"):
        sprompt.load(tmp_path, model="mask2former")


def test_a_file_of_the_release(tmp_path: Path) -> None:
    """Names written out by hand, from those of the release's modules."""
    torch.manual_seed(0)
    model = Mask2Former(TINY)
    own, released = model.state_dict(), {"criterion.empty_weight": torch.ones(4)}

    def take(name: str, *sources: str) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            if f"{sources[0]}.{part}" in own:
                released[f"{name}.{part}"] = torch.cat([own[f"{s}.{part}"] for s in sources])

    take("backbone.stem.conv1", "backbone.conv1")
    take("backbone.stem.conv1.norm", "backbone.bn1")
    for stage in range(4):
        for block in range(2):
            ours, theirs_ = f"backbone.layer{stage + 1}.{block}", f"backbone.res{stage + 2}.{block}"
            for k in (1, 2):
                take(f"{theirs_}.conv{k}", f"{ours}.conv{k}")
                take(f"{theirs_}.conv{k}.norm", f"{ours}.bn{k}")
            take(f"{theirs_}.shortcut", f"{ours}.downsample.0")
            take(f"{theirs_}.shortcut.norm", f"{ours}.downsample.1")
    pixels, predictor = "sem_seg_head.pixel_decoder", "sem_seg_head.predictor"
    for k in range(3):
        take(f"{pixels}.input_proj.{k}.0", f"pixel_decoder.input_projections.{k}.0")
        take(f"{pixels}.input_proj.{k}.1", f"pixel_decoder.input_projections.{k}.1")
        take(f"{predictor}.mask_embed.layers.{k}", f"transformer_module.decoder.mask_predictor.mask_embedder.{k}.0")
    released[f"{pixels}.transformer.level_embed"] = own["pixel_decoder.level_embed"]
    for k in range(TINY.encoder_layers):
        ours, theirs_ = f"pixel_decoder.encoder.layers.{k}", f"{pixels}.transformer.encoder.layers.{k}"
        for part in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
            take(f"{theirs_}.self_attn.{part}", f"{ours}.self_attn.{part}")
        for name, source in (
            ("norm1", "self_attn_layer_norm"),
            ("norm2", "final_layer_norm"),
            ("linear1", "fc1"),
            ("linear2", "fc2"),
        ):
            take(f"{theirs_}.{name}", f"{ours}.{source}")
    take(f"{pixels}.mask_features", "pixel_decoder.mask_projection")
    for part in ("adapter_1", "layer_1"):
        take(f"{pixels}.{part}", f"pixel_decoder.{part}.0")
        take(f"{pixels}.{part}.norm", f"pixel_decoder.{part}.1")
    for name, source in (
        ("query_feat", "queries_features"), ("query_embed", "queries_embedder"), ("level_embed", "level_embed"),
        ("decoder_norm", "decoder.layernorm"),
    ):  # fmt: skip
        take(f"{predictor}.{name}", f"transformer_module.{source}")
    take(f"{predictor}.class_embed", "class_predictor")
    for k in range(TINY.decoder_layers):
        ours = f"transformer_module.decoder.layers.{k}"
        to_self, to_map = (
            f"{predictor}.transformer_self_attention_layers.{k}",
            f"{predictor}.transformer_cross_attention_layers.{k}",
        )
        for part in ("weight", "bias"):
            thirds = [own[f"{ours}.self_attn.{p}_proj.{part}"] for p in "qkv"]
            released[f"{to_self}.self_attn.in_proj_{part}"] = torch.cat(thirds)
            released[f"{to_map}.multihead_attn.in_proj_{part}"] = own[f"{ours}.cross_attn.in_proj_{part}"]
        take(f"{to_self}.self_attn.out_proj", f"{ours}.self_attn.out_proj")
        take(f"{to_map}.multihead_attn.out_proj", f"{ours}.cross_attn.out_proj")
        take(f"{to_self}.norm", f"{ours}.self_attn_layer_norm")
        take(f"{to_map}.norm", f"{ours}.cross_attn_layer_norm")
        feed = f"{predictor}.transformer_ffn_layers.{k}"
        for name, source in (("linear1", "fc1"), ("linear2", "fc2"), ("norm", "final_layer_norm")):
            take(f"{feed}.{name}", f"{ours}.{source}")
    torch.save({"model": released}, tmp_path / "release.pth")
    torch.manual_seed(1)
    fresh = Mask2Former(TINY)
    assert "the release of Mask2Former" in import_checkpoint(fresh, tmp_path / "release.pth")
    assert all(torch.equal(t, own[n]) for n, t in fresh.state_dict().items())
