"""RF-DETR of transformers on the kernels of this library: the same results before, while and after. Needs transformers."""

import torch
from transformers import RfDetrConfig, RfDetrDinov2Config, RfDetrForInstanceSegmentation

import sprompt

torch.manual_seed(0)
backbone = RfDetrDinov2Config(
    image_size=96, patch_size=12, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_windows=2,
    out_features=["stage1", "stage2"],
)  # fmt: skip
config = RfDetrConfig(backbone_config=backbone, d_model=64, decoder_layers=2, num_queries=20, num_labels=3)
model = RfDetrForInstanceSegmentation(config).eval()  # a small one with random weights; or one .from_pretrained(...)
pictures = torch.randn(2, 3, 96, 96)


def masks() -> torch.Tensor:
    with torch.no_grad(), sprompt.trace_backends() as ran:
        found = model(pictures).pred_masks
    print(f"{len(ran)} attentions by sprompt {ran[:1]}; logits of masks {tuple(found.shape)}, mean {found.mean():.5f}")
    return found


before = masks()
sprompt.patch.deformable_attention()  # the model is built already; it could also be built now
between = masks()
sprompt.patch.undo()
after = masks()
torch.testing.assert_close(between, before, rtol=1e-4, atol=1e-4)
assert torch.equal(after, before)
print(f"largest difference {(between - before).abs().max():.1g} of {before.abs().max():.2g}")
