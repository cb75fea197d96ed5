"""A step of training never waits for the GPU, and can be captured in a CUDA graph. `make gpu` runs these tests; elsewhere
they are skipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from sprompt.data.sample import Batch, Sample
from sprompt.data.transforms import collate
from sprompt.masks import BitMasks
from sprompt.methods.supervised import Supervised
from sprompt.models.knet import KNet, KNetConfig
from sprompt.testing.compare import assert_close, tensors
from sprompt.testing.spec import blobs, random

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SIZE, PAD_TO, MAX_MASKS = (90, 120), (96, 128), 6


def batch(seed: int, device: str = "cuda") -> Batch:
    """A batch of fixed shapes with two pictures, which have different numbers of masks. Seeds have scale 0 and stride 32."""
    samples = []
    for index, count in enumerate((5, 3 - seed)):
        image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8, generator=random(10 * seed + index))
        masks = BitMasks.from_dense(blobs(count, *SIZE, 10 * seed + index))
        seeds = torch.tensor([[16.0 + 32 * (g % 3), 16.0, 0.0] for g in range(count)])
        labels = torch.zeros(count, dtype=torch.int64)
        samples.append(Sample(image, masks, labels, index, f"picture {index}", SIZE, seeds))
    return collate(samples, pad_to=PAD_TO, max_masks=MAX_MASKS).to(device)


def model(device: str = "cuda") -> KNet:
    torch.manual_seed(0)
    config = KNetConfig(
        depth=18, backbone_width=8, channels=32, heads=4, feedforward=64, kernels=12, num_classes=1, frozen_stages=4
    )
    return KNet(config).to(device).train()


def step(task: nn.Module, data: Batch) -> tuple[Tensor, dict[str, Tensor], tuple[Tensor, ...]]:
    """The loss, its terms, and the gradients of all trained parameters."""
    total, terms = task(data, 0)
    return total.detach(), terms, torch.autograd.grad(total, [p for p in task.parameters() if p.requires_grad])


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_waits_for_nothing() -> None:
    task = Supervised(model())
    step(task, batch(0))  # compiles and loads the kernels
    data = batch(1)
    with waiting_is_an_error():
        step(task, data)


@pytest.mark.parametrize("site", ["kernel", "proposal", "late"])
def test_a_step_of_pretraining_waits_for_nothing(site: str) -> None:
    for package in ("safetensors", "PIL"):  # for the method's proposal files; a GPU machine may lack these packages
        pytest.importorskip(package)
    from sprompt.methods.saliency_prompt.config import SaliencyPromptConfig
    from sprompt.methods.saliency_prompt.pretrain import Pretraining

    task = Pretraining(model(), SaliencyPromptConfig(site=site)).cuda().train()
    step(task, batch(0))
    data = batch(1)
    with waiting_is_an_error():
        step(task, data)


def test_a_step_replays_from_a_cuda_graph() -> None:
    """A step that is captured with one batch and replayed with another batch gives the numbers of a direct step."""
    task = Supervised(model())
    other = batch(1)
    expected = step(task, other)
    static = batch(0)
    shapes = [t.shape for t in tensors(inputs(static))]
    assert shapes == [t.shape for t in tensors(inputs(other))], "collate gives batches of one shape"

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        step(task, static)
        with waiting_is_an_error():  # a capture that fails half-way would fail all later ones
            step(task, static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(task, static)
    for target, source in zip(tensors(inputs(static)), tensors(inputs(other)), strict=True):
        target.copy_(source)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    # torch's own gradients of interpolation are sums in any order
    assert_close(captured, expected, 1e-3, 1e-6)


def inputs(data: Batch) -> list[Tensor]:
    return [data.images, data.masks.words, data.labels, data.counts]
