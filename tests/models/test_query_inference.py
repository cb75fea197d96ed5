"""Results of queries equal two dense resizes of their logits."""

import pytest
import torch
from torch import Tensor, nn

from sprompt.models.query_inference import predictions


@pytest.mark.parametrize("threshold", (0.5, 0.3))
def test_inference_equals_two_dense_resizes(threshold: float) -> None:
    """A picture of odd sizes, padded: logits are resized to the padded input, cut to the image and resized to the picture, all
    as float pictures in float64."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    features, embeddings, classes = normal(2, 16, 24, 32), normal(2, 9, 16) / 4, 2 * normal(2, 9, 4)
    input_size, sizes, originals = (96, 128), [(91, 117), (96, 83)], [(133, 171), (57, 49)]
    found = predictions("Mask2Former", features, embeddings, classes, input_size, sizes, originals, threshold, 12)
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
