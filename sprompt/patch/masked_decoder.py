"""The decoder of transformers' Mask2Former on mask_conv, mask_bits and mask_attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sprompt.masks import BitMasks
from sprompt.ops import mask_attention, mask_bits, mask_conv
from sprompt.patch.replaced import original

Function = Callable[..., Any]


def changes(modeling: ModuleType, idle_draws: bool) -> list[tuple[Any, str, Any]]:
    """The replaced methods: (class, name, method). idle_draws: one number is drawn for every layer, as some versions do."""
    decoder, layer = modeling.Mask2FormerMaskedAttentionDecoder, modeling.Mask2FormerMaskedAttentionDecoderLayer
    # Not the layer's forward: transformers has wrapped it for gradient checkpointing.
    return [
        (decoder, "forward", _decoder(modeling, original(decoder, "forward"), idle_draws)),
        (layer, "forward_post", _layer(original(layer, "forward_post"), norm_first=False)),
        (layer, "forward_pre", _layer(original(layer, "forward_pre"), norm_first=True)),
    ]


def _decoder(modeling: ModuleType, unpatched: Function, idle_draws: bool) -> Function:
    @functools.wraps(unpatched)
    def forward(
        self: Any,
        inputs_embeds: Tensor | None = None,
        multi_stage_positional_embeddings: Any = None,
        pixel_embeddings: Tensor | None = None,
        encoder_hidden_states: Any = None,
        query_position_embeddings: Tensor | None = None,
        feature_size_list: Any = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if attentions or not _served(self, modeling):
            return unpatched(
                self, inputs_embeds, multi_stage_positional_embeddings, pixel_embeddings, encoder_hidden_states,
                query_position_embeddings, feature_size_list, output_attentions, output_hidden_states, return_dict,
            )  # fmt: skip
        assert inputs_embeds is not None and pixel_embeddings is not None
        # Resizing and the product with a query are both linear, so the mask features are resized once for each level.
        with torch.no_grad():
            resized = [
                F.interpolate(pixel_embeddings, size=tuple(size), mode="bilinear", align_corners=False)
                for size in feature_size_list
            ]
        states, normed, masks = [inputs_embeds], [self.layernorm(inputs_embeds)], []
        for number, layer in enumerate((*self.layers, None)):
            embeddings = self.mask_predictor.mask_embedder(normed[-1].transpose(0, 1))
            masks.append(mask_conv(pixel_embeddings, embeddings))
            if layer is None:
                break
            if idle_draws:
                torch.rand([])
            level = number % self.num_feature_levels
            bits = mask_bits(resized[level], embeddings.detach())
            x = layer(  # tensors with a gradient by position: gradient checkpointing needs it
                states[-1], level, None, multi_stage_positional_embeddings, query_position_embeddings, encoder_hidden_states,
                encoder_attention_mask=bits, output_attentions=False,
            )[0]  # fmt: skip
            states.append(x)
            normed.append(self.layernorm(x))
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        result = {
            "last_hidden_state": states[-1].transpose(1, 0), "hidden_states": tuple(states) if hidden else None,
            "intermediate_hidden_states": tuple(normed), "masks_queries_logits": tuple(masks),
        }  # fmt: skip
        if self.config.return_dict if return_dict is None else return_dict:
            return modeling.Mask2FormerMaskedAttentionDecoderOutput(**result)
        return tuple(value for value in result.values() if value is not None)

    return forward


def _served(decoder: Any, modeling: ModuleType) -> bool:
    """Whether the loop above computes what the modules would: no dropout, and no replaced or hooked module that it passes by."""
    predictor = decoder.mask_predictor
    if type(predictor) is not modeling.Mask2FormerMaskPredictor or _hooked(predictor):
        return False
    if decoder.training and decoder.layerdrop > 0:
        return False
    for layer in decoder.layers:
        if type(layer) is not modeling.Mask2FormerMaskedAttentionDecoderLayer:
            return False
        attention = layer.cross_attn
        if type(attention) is not nn.MultiheadAttention or _hooked(attention):
            return False
        if type(attention.out_proj) is not NonDynamicallyQuantizableLinear:
            return False
        if layer.training and max(layer.dropout, layer.activation_dropout, attention.dropout) > 0:
            return False
    return True


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(len(each) > 0 for each in hooks)


def _layer(unpatched: Function, norm_first: bool) -> Function:
    @functools.wraps(unpatched)
    def forward(
        self: Any,
        hidden_states: Tensor,
        level_index: int | None = None,
        attention_mask: Tensor | None = None,
        position_embeddings: Any = None,
        query_position_embeddings: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Tensor | BitMasks | None = None,
        output_attentions: bool | None = False,
    ) -> Any:
        if not isinstance(encoder_attention_mask, BitMasks):
            return unpatched(
                self, hidden_states, level_index, attention_mask, position_embeddings, query_position_embeddings,
                encoder_hidden_states, encoder_attention_mask, output_attentions,
            )  # fmt: skip
        masks, places = encoder_attention_mask, query_position_embeddings
        values = encoder_hidden_states[level_index]
        keys = values + position_embeddings[level_index]

        def block(x: Tensor, norm: nn.Module, step: Function) -> Tensor:
            return x + step(norm(x)) if norm_first else norm(x + step(x))

        def attend(x: Tensor) -> Tensor:
            return _cross_attention(self.cross_attn, x + places, keys, values, masks)

        def among_queries(x: Tensor) -> Tensor:
            found, _ = self.self_attn(
                hidden_states=x, position_embeddings=places, attention_mask=None, output_attentions=True
            )
            return found

        x = block(hidden_states, self.cross_attn_layer_norm, attend)
        x = block(x, self.self_attn_layer_norm, among_queries)
        return (block(x, self.final_layer_norm, lambda x: self.fc2(self.activation_fn(self.fc1(x)))),)

    return forward


def _cross_attention(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, masks: BitMasks
) -> Tensor:
    """Masked attention with the parameters of the module; query (Q, B, C), key and value (S, B, C), masks (B, Q) of S pixels."""
    weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
    query, key, value = (
        F.linear(given, w, b).unflatten(2, (module.num_heads, -1)).permute(1, 2, 0, 3)
        for given, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    out = mask_attention(query, key, value, masks).permute(2, 0, 1, 3).flatten(2)
    return F.linear(out, module.out_proj.weight, module.out_proj.bias)
