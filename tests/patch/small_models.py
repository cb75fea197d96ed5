"""Small models of transformers with random weights, one of each family with a multi-scale deformable attention, and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

#: Height and width of the pictures: not square, so that a mistaken order of the axes is seen.
SIZE = (64, 96)
CLASSES = 5
WIDTH, HEADS, QUERIES, FEEDFORWARD = 32, 4, 7, 24

#: {name of the family: builds its model and inputs}. The inputs have labels where the family has a loss.
FAMILIES: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {}


def family(build: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> Callable[[], tuple[nn.Module, dict[str, Any]]]:
    FAMILIES[build.__name__] = build
    return build


def small(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a family in evaluation mode, and its inputs. Weights are as large as they are after a training: at their
    usual initialisation, queries sample alike and several families forget what they sampled."""
    torch.manual_seed(0)
    model, inputs = FAMILIES[name]()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=(weight.numel() / len(weight)) ** -0.5)
            elif key.endswith("bias"):
                weight.normal_(std=0.1)

    def converted(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(dtype) if x.is_floating_point() else x
        if isinstance(x, list):
            return [converted(each) for each in x]
        return {key: converted(each) for key, each in x.items()} if isinstance(x, dict) else x

    return model.to(dtype).eval(), converted(inputs)


def pictures(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE)


def boxes(count: int = 2, masks: bool = False) -> list[dict[str, Tensor]]:
    """Labels of pictures: classes, boxes (cx, cy, w, h) relative to the picture, and masks where they are asked for."""
    labels = []
    for picture in range(count):
        number = 2 + picture
        each = {"class_labels": torch.randint(0, CLASSES, (number,)), "boxes": 0.25 + 0.3 * torch.rand(number, 4)}
        if masks:
            each["masks"] = (torch.rand(number, *SIZE) > 0.5).float()
        labels.append(each)
    return labels


def resnet(stages: int = 3) -> Any:
    return transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=[f"stage{n}" for n in range(5 - stages, 5)],
    )  # fmt: skip


def plain_resnet(stages: int = 4) -> Any:
    return transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=[f"stage{n}" for n in range(5 - stages, 5)],
    )  # fmt: skip


def hgnet(stages: int = 3) -> Any:
    return transformers.HGNetV2Config(
        stem_channels=[3, 8, 8], stage_in_channels=[8, 8, 16, 24], stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 24, 32], stage_num_blocks=[1, 1, 1, 1], stage_numb_of_layers=[1, 1, 1, 1],
        hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], embedding_size=8,
        out_features=[f"stage{n}" for n in range(5 - stages, 5)],
    )  # fmt: skip


def swin() -> Any:
    return transformers.SwinConfig(
        image_size=SIZE, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip


def bert() -> Any:
    return transformers.BertConfig(
        vocab_size=1200, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


def hybrid(backbone: Any, **more: Any) -> dict[str, Any]:
    """Settings that the families descended from RT-DETR share."""
    return dict(
        backbone_config=backbone, num_labels=CLASSES, encoder_hidden_dim=WIDTH, encoder_in_channels=[16, 24, 32],
        encoder_ffn_dim=FEEDFORWARD, encoder_attention_heads=HEADS, d_model=WIDTH, num_queries=QUERIES,
        decoder_in_channels=[WIDTH] * 3, decoder_ffn_dim=FEEDFORWARD, decoder_layers=2, decoder_attention_heads=HEADS,
        num_denoising=0, hidden_expansion=0.5,
    ) | more  # fmt: skip


@family
def rt_detr() -> tuple[nn.Module, dict[str, Any]]:
    model = transformers.RTDetrForObjectDetection(transformers.RTDetrConfig(**hybrid(resnet())))
    return model, {"pixel_values": pictures(), "labels": boxes()}


@family
def rt_detr_v2() -> tuple[nn.Module, dict[str, Any]]:
    model = transformers.RTDetrV2ForObjectDetection(transformers.RTDetrV2Config(**hybrid(resnet(), decoder_n_points=3)))
    return model, {"pixel_values": pictures(), "labels": boxes()}


@family
def d_fine() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DFineConfig(**hybrid(hgnet(), decoder_n_points=[3, 2, 1], max_num_bins=8, lqe_hidden_dim=8))
    return transformers.DFineForObjectDetection(config), {"pixel_values": pictures(), "labels": boxes()}


@family
def deimv2() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Deimv2Config(**hybrid(hgnet(), decoder_n_points=[3, 1, 2], max_num_bins=8, lqe_hidden_dim=8))
    return transformers.Deimv2ForObjectDetection(config), {"pixel_values": pictures(), "labels": boxes()}


@family
def lw_detr() -> tuple[nn.Module, dict[str, Any]]:
    backbone = transformers.LwDetrViTConfig(
        image_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, window_block_indices=[0],
        num_windows=4, out_indices=[1, 2],
    )  # fmt: skip
    config = transformers.LwDetrConfig(
        backbone_config=backbone, num_labels=CLASSES, projector_scale_factors=[1.0, 2.0], c2f_num_blocks=1, d_model=WIDTH,
        decoder_ffn_dim=FEEDFORWARD, decoder_layers=2, decoder_self_attention_heads=HEADS,
        decoder_cross_attention_heads=HEADS, num_queries=QUERIES, group_detr=2,
    )  # fmt: skip
    return transformers.LwDetrForObjectDetection(config), {"pixel_values": pictures(), "labels": boxes()}


def rf_detr_config() -> Any:
    backbone = transformers.RfDetrDinov2Config(
        image_size=64, patch_size=16, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_windows=2,
        out_features=["stage1", "stage2"],
    )  # fmt: skip
    return transformers.RfDetrConfig(
        backbone_config=backbone, num_labels=CLASSES, c2f_num_blocks=1, d_model=WIDTH, decoder_ffn_dim=FEEDFORWARD,
        decoder_layers=2, decoder_self_attention_heads=HEADS, decoder_cross_attention_heads=HEADS, num_queries=QUERIES,
        group_detr=2, dropout=0.0,
    )  # fmt: skip


@family
def rf_detr() -> tuple[nn.Module, dict[str, Any]]:
    return transformers.RfDetrForObjectDetection(rf_detr_config()), {"pixel_values": pictures(), "labels": boxes()}


@family
def rf_detr_masks() -> tuple[nn.Module, dict[str, Any]]:
    model = transformers.RfDetrForInstanceSegmentation(rf_detr_config())
    return model, {"pixel_values": pictures(), "labels": boxes(masks=True)}


@family
def deformable_detr() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DeformableDetrConfig(
        backbone_config=plain_resnet(3), num_labels=CLASSES, num_queries=QUERIES, encoder_layers=1, encoder_ffn_dim=FEEDFORWARD,
        encoder_attention_heads=HEADS, decoder_layers=2, decoder_ffn_dim=FEEDFORWARD, decoder_attention_heads=HEADS,
        d_model=WIDTH, with_box_refine=True, two_stage=True, two_stage_num_proposals=QUERIES, auxiliary_loss=True,
    )  # fmt: skip
    mask = torch.ones(2, *SIZE, dtype=torch.int64)
    mask[1, :, 70:] = 0
    inputs = {"pixel_values": pictures(), "pixel_mask": mask, "labels": boxes()}
    return transformers.DeformableDetrForObjectDetection(config), inputs


def grounding(config: type, model: type) -> tuple[nn.Module, dict[str, Any]]:
    settings = config(
        backbone_config=swin(), text_config=bert(), num_queries=QUERIES, encoder_layers=1, encoder_ffn_dim=FEEDFORWARD,
        encoder_attention_heads=HEADS, decoder_layers=2, decoder_ffn_dim=FEEDFORWARD, decoder_attention_heads=HEADS,
        d_model=WIDTH, max_text_len=16,
    )  # fmt: skip
    words = torch.tensor([[101, 40, 1012, 41, 1012, 102]] * 2)  # two phrases, each ended by a full stop
    labels = boxes()
    for each in labels:
        each["class_labels"] %= 2
    mask = torch.ones_like(words)
    return model(settings), {"pixel_values": pictures(), "input_ids": words, "attention_mask": mask, "labels": labels}


@family
def grounding_dino() -> tuple[nn.Module, dict[str, Any]]:
    return grounding(transformers.GroundingDinoConfig, transformers.GroundingDinoForObjectDetection)


@family
def mm_grounding_dino() -> tuple[nn.Module, dict[str, Any]]:
    return grounding(transformers.MMGroundingDinoConfig, transformers.MMGroundingDinoForObjectDetection)


@family
def omdet_turbo() -> tuple[nn.Module, dict[str, Any]]:
    text = transformers.CLIPTextConfig(
        vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=16,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    config = transformers.OmDetTurboConfig(
        backbone_config=swin(), text_config=text, num_queries=QUERIES, text_projection_in_dim=16, text_projection_out_dim=16,
        class_embed_dim=16, task_encoder_hidden_dim=FEEDFORWARD, encoder_hidden_dim=WIDTH, decoder_hidden_dim=WIDTH,
        vision_features_channels=[WIDTH] * 3, encoder_in_channels=[16, 32, 64], encoder_dim_feedforward=FEEDFORWARD,
        encoder_attention_heads=HEADS, decoder_num_heads=HEADS, decoder_num_layers=2, decoder_dim_feedforward=FEEDFORWARD,
        apply_layernorm_after_vision_backbone=False,
    )  # fmt: skip
    words = torch.tensor([[0, 5, 6, 2], [0, 7, 8, 2], [0, 9, 5, 2], [0, 4, 4, 2]])
    return transformers.OmDetTurboForObjectDetection(config), {
        "pixel_values": pictures(), "classes_input_ids": words, "classes_attention_mask": torch.ones_like(words),
        "tasks_input_ids": words[:2], "tasks_attention_mask": torch.ones_like(words[:2]),
        "classes_structure": torch.tensor([2, 2]),
    }  # fmt: skip


@family
def mask2former() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.Mask2FormerConfig(
        backbone_config=plain_resnet(), num_labels=CLASSES, num_queries=QUERIES, feature_size=WIDTH, mask_feature_size=WIDTH,
        hidden_dim=WIDTH, num_attention_heads=HEADS, encoder_layers=1, encoder_feedforward_dim=FEEDFORWARD, decoder_layers=3,
        dim_feedforward=FEEDFORWARD, train_num_points=50,
    )  # fmt: skip
    labels = boxes(masks=True)
    return transformers.Mask2FormerForUniversalSegmentation(config), {
        "pixel_values": pictures(), "mask_labels": [each["masks"] for each in labels],
        "class_labels": [each["class_labels"] for each in labels],
    }  # fmt: skip


@family
def oneformer() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.OneFormerConfig(
        backbone_config=plain_resnet(), num_labels=CLASSES, num_queries=QUERIES, conv_dim=64, mask_dim=64, hidden_dim=64,
        num_attention_heads=HEADS, encoder_layers=1, encoder_feedforward_dim=FEEDFORWARD, decoder_layers=2,
        dim_feedforward=FEEDFORWARD, train_num_points=50, is_training=True, dropout=0.0, task_seq_len=6,
        text_encoder_width=64, text_encoder_context_length=6, text_encoder_num_layers=1, text_encoder_vocab_size=50,
        text_encoder_n_ctx=2,
    )  # fmt: skip
    labels = boxes(masks=True)
    return transformers.OneFormerForUniversalSegmentation(config), {
        "pixel_values": pictures(), "task_inputs": torch.randint(0, 50, (2, 6)).float(),
        "text_inputs": torch.randint(0, 50, (2, QUERIES - 2, 6)), "mask_labels": [each["masks"] for each in labels],
        "class_labels": [each["class_labels"] for each in labels],
    }  # fmt: skip


@family
def pp_doclayout_v2() -> tuple[nn.Module, dict[str, Any]]:
    order = dict(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1, coordinate_size=3, shape_size=2,
        relation_bias_embed_dim=4, global_pointer_head_size=8, num_classes=CLASSES, max_position_embeddings=32,
    )  # fmt: skip
    config = transformers.PPDocLayoutV2Config(
        **hybrid(
            hgnet(), reading_order_config=order, class_thresholds=[0.0] * CLASSES, class_order=list(range(CLASSES))
        )
    )
    return transformers.PPDocLayoutV2ForObjectDetection(config), {"pixel_values": pictures()}


@family
def pp_doclayout_v3() -> tuple[nn.Module, dict[str, Any]]:
    settings = hybrid(
        hgnet(4), global_pointer_head_size=8, mask_feature_channels=[8, 8], x4_feat_dim=8, num_prototypes=4
    )
    model = transformers.PPDocLayoutV3ForObjectDetection(transformers.PPDocLayoutV3Config(**settings))
    return model, {"pixel_values": pictures()}


@family
def pp_doclayout_v4() -> tuple[nn.Module, dict[str, Any]]:
    settings = hybrid(hgnet(), global_pointer_head_size=8)
    model = transformers.PPDocLayoutV4ForObjectDetection(transformers.PPDocLayoutV4Config(**settings))
    return model, {"pixel_values": pictures()}
