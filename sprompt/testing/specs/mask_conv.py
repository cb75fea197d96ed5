"""mask_conv, mask_bits, mask_pool, mask_update."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import mask_bits, mask_conv, mask_pool, mask_update, pack_masks
from sprompt.testing.spec import Bench, ErrorCase, OpSpec, Prepared, Sample, blobs, random, refusals

#: B, N, C, H, W. Numbers of pixels below, equal to and above multiples of 64; channels and kernels that do not fill a register.
SIZES = ((2, 5, 7, 4, 8), (1, 1, 1, 1, 1), (2, 13, 40, 9, 15), (1, 7, 130, 8, 8), (1, 30, 20, 5, 39), (2, 2, 3, 1, 65))
EMPTY = {
    "no images": (0, 2, 3, 4, 5),
    "no kernels": (2, 0, 3, 4, 5),
    "no pixels": (2, 3, 4, 0, 5),
    "no channels": (1, 2, 0, 3, 3),
}


def _named(sizes: tuple[int, ...]) -> str:
    return "B {}, N {}, C {}, {}x{}".format(*sizes)


def _odd(shape: tuple[int, ...], seed: int) -> Tensor:
    return 2.0 * torch.randint(-2, 2, shape, generator=random(seed)) + 1.0


def _whole(sizes: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Features and kernels of small whole numbers with odd logits. The logits are exact in every dtype and order, and never 0.
    So neither rounding nor a step of a numerical gradient moves a logit across the threshold."""
    B, N, C, H, W = sizes
    features, kernels = _odd((B, C, H, W), seed), _odd((B, N, C), seed + 1)
    if C > 0 and C % 2 == 0:
        kernels[..., 0] += 1
    return features, kernels


def _normal(sizes: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    B, N, C, H, W = sizes
    g = random(seed)
    return torch.randn(B, C, H, W, generator=g), torch.randn(B, N, C, generator=g)


def _with_zeros(sizes: tuple[int, ...], seed: int) -> tuple[Tensor, Tensor]:
    """Small whole numbers, so that logits are exact. Many are 0."""
    B, N, C, H, W = sizes
    g = random(seed)
    return torch.randint(-1, 2, (B, C, H, W), generator=g).float(), torch.randint(-1, 2, (B, N, C), generator=g).float()


Draw = Callable[[tuple[int, ...], int], tuple[Tensor, Tensor]]


def _product_samples(draw: Draw) -> Callable[[torch.device, torch.dtype, int], list[Sample]]:
    def samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
        made = {_named(sizes): draw(sizes, seed) for sizes in SIZES}
        made |= {name: draw(sizes, seed) for name, sizes in EMPTY.items()}
        features, kernels = draw((3, 4, 6, 5, 7), seed)
        made["one set of kernels for all images"] = (features, kernels[:1].expand(3, 4, 6))
        made["channels last"] = (features.contiguous(memory_format=torch.channels_last), kernels)
        made["a crop"] = (draw((3, 4, 6, 9, 12), seed)[0][:, :, 2:7, 3:10], kernels.mT.contiguous().mT)
        return [Sample(name, tuple(t.to(device, dtype) for t in pair)) for name, pair in made.items()]

    return samples


def _bits_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    features, kernels = _with_zeros((2, 3, 4, 5, 14), seed)
    features[0, :, 1, 3] = float("nan")
    features[0, :, 2, 2], kernels[0] = float("inf"), kernels[0].abs() + 1
    features[1, :, 3], kernels[1, 1] = -0.0, float("nan")
    special = Sample("NaN, infinities and -0", (features.to(device, dtype), kernels.to(device, dtype)))
    return [*_product_samples(_with_zeros)(device, dtype, seed), special]


def _pool_samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    samples = []
    for (B, N, C, H, W), density in zip(SIZES, (0.3, 1.0, 0.05, 0.6, 0.9, 0.5), strict=True):
        features, _ = _normal((B, N, C, H, W), seed)
        masks = torch.rand(B, N, H, W, generator=random(seed + 2)) < density
        samples.append(Sample(f"{_named((B, N, C, H, W))}, {density:.0%} set", (features, pack_masks(masks))))
    features, _ = _normal((2, 1, 6, 20, 21), seed)
    logits = torch.randn(2, 9, 20, 21, generator=random(seed + 3))
    logits[0, 0, 0, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-7])
    logits[0, 1], logits[1, 2] = -1.0, 1.0
    soft = torch.stack((blobs(9, 20, 21, seed), blobs(9, 20, 21, seed + 1)))
    samples += [
        Sample("logits, with NaN, infinities and zeros, an empty and a full mask", (features, logits)),
        Sample("bool", (features, logits > 0.7)),
        Sample("uint8 of 0, 1, 255", (features, (logits > 1).to(torch.uint8) * 255)),
        Sample("blobs", (features, pack_masks(soft))),
        Sample("full masks", (features, torch.ones(2, 3, 20, 21, dtype=torch.bool))),
        Sample("one mask for all images", (features, pack_masks(soft)[:1].words.expand(2, 9, -1))),
        Sample("channels last", (features.contiguous(memory_format=torch.channels_last), logits)),
    ]
    samples[-2] = Sample(samples[-2].name, (features, BitMasks(samples[-2].args[1], (20, 21))))
    for name, sizes in EMPTY.items():
        B, N, _, H, W = sizes
        samples.append(Sample(name, (_normal(sizes, seed)[0], torch.ones(B, N, H, W, dtype=torch.bool))))
    return [s.map(lambda t: t.to(device, dtype) if t.is_floating_point() else t.to(device)) for s in samples]


# -- ground truth in float64, one kernel at a time


def _conv_oracle(features: Tensor, kernels: Tensor) -> Tensor:
    B, N, _ = kernels.shape
    out = features.new_zeros((B, N, *features.shape[2:]))
    for n in range(N):
        out[:, n] = (features * kernels[:, n, :, None, None]).sum(1)
    return out


def _bits_oracle(features: Tensor, kernels: Tensor) -> BitMasks:
    return BitMasks.from_dense(_conv_oracle(features, kernels) >= 0)


def _pool_oracle(features: Tensor, masks: BitMasks | Tensor) -> Tensor:
    dense = masks.to_dense() if isinstance(masks, BitMasks) else masks > 0
    out = features.new_zeros((features.shape[0], dense.shape[1], features.shape[1]))
    for n in range(dense.shape[1]):
        out[:, n] = torch.where(dense[:, n, None], features, 0.0).sum((2, 3))
    return out


def _update_oracle(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    logits = _conv_oracle(features, kernels)
    return logits, _pool_oracle(features, logits)


def _bound(sample: Sample) -> tuple[float, float]:
    """Rounding errors of the longest sum: over channels forward, over kernels and pixels backward and in pooling."""
    features, other = sample.args
    length = max(features.shape[1], other.shape[1], features.shape[2] * features.shape[3])
    return 1.2e-7 * (length + 4), 1e-6


_f, _k, _m = torch.zeros(2, 3, 4, 5), torch.zeros(2, 6, 3), torch.zeros(2, 6, 4, 5)
_bits = BitMasks(torch.zeros(2, 6, 1, dtype=torch.int32), (4, 5))
_bad_pool = refusals(mask_pool)


def _product_errors(function: Callable[..., object]) -> tuple[ErrorCase, ...]:
    bad = refusals(function)
    return (
        bad("features None", r"features must be a tensor, got NoneType", None, _k, error=TypeError),
        bad("integer features", r"features must have dtype float32, ", _f.int(), _k, error=TypeError),
        bad("integer kernels", r"kernels must have dtype float32, ", _f, _k.long(), error=TypeError),
        bad("no batch", r"features must have shape \(B, C, H, W\), got \(3, 4, 5\)", _f[0], _k),
        bad("1x1 axes", r"kernels must have shape \(B, N, C\), got \(2, 6, 3, 1, 1\); drop 1x1 axes", _f, _k[..., None, None]),
        bad("batches differ", r"kernels must have shape \(B, N, C\) with B = 2 and C = 3, got \(1, 6, 3\); .*expand", _f, _k[:1]),
        bad("channels differ", r"kernels must have shape \(B, N, C\) with B = 2 and C = 3, got \(2, 6, 2\)", _f, _k[..., :2]),
        bad("devices differ", r"kernels must be on the device of features", _f, _k.to("meta")),
    )  # fmt: skip


SPECS = [
    OpSpec(
        mask_conv, _product_samples(_normal), ("mask_conv", "mask_conv_backward"), gradients=("features", "kernels"),
        oracle=_conv_oracle, bound=_bound, autocast="cast", errors=_product_errors(mask_conv),
    ),
    OpSpec(
        mask_bits, _bits_samples, ("mask_bits",), oracle=_bits_oracle, autocast="cast", errors=_product_errors(mask_bits),
    ),
    OpSpec(
        mask_pool, _pool_samples, ("mask_pool", "mask_pool_backward"), gradients=("features",), oracle=_pool_oracle, bound=_bound,
        errors=(
            _bad_pool("features a list", r"features must be a tensor, got list", [1], _m, error=TypeError),
            _bad_pool("integer features", r"features must have dtype float32, ", _f.int(), _m, error=TypeError),
            _bad_pool("no batch", r"features must have shape \(B, C, H, W\), got \(3, 4, 5\)", _f[0], _m),
            _bad_pool("masks None", r"masks must be a BitMasks or a dense tensor, got NoneType", _f, None, error=TypeError),
            _bad_pool("complex masks", r"masks must have dtype bool, ", _f, _m.cfloat(), error=TypeError),
            _bad_pool("masks of one image", r"masks must have batch dimensions \(B, N\) with B = 2, got \(6,\)", _f, _m[0]),
            _bad_pool("batches differ", r"masks must have batch dimensions \(B, N\) with B = 2, got \(1, 6\)", _f, _bits[:1]),
            _bad_pool("sizes differ", r"masks must have the size of the features, \(4, 5\), got \(5, 4\); resize", _f, _m.mT),
            _bad_pool("devices differ", r"masks must be on the device of features", _f.to("meta"), _bits),
        ),
    ),
    OpSpec(
        mask_update, _product_samples(_whole), ("mask_update", "mask_update_backward"), gradients=("features", "kernels"),
        oracle=_update_oracle, bound=_bound, autocast="cast", errors=_product_errors(mask_update),
    ),
]  # fmt: skip


# -- benchmarks: the einsums of the released code

B, N, C, H, W = 2, 100, 256, 100, 168
P = H * W


def _five_percent(device: torch.device, dtype: torch.dtype, seed: int, B: int = B) -> Sample:
    """Whole numbers, which are exact in every order, so all functions must agree to the bit. 5 % of the logits are above 0."""
    g = random(seed)
    features = torch.randint(-2, 3, (B, C, H, W), generator=g)
    kernels = torch.randint(-2, 3, (B, N, C), generator=g)
    features[:, 0], kernels[:, :, 0] = 1, -53  # 1.64 standard deviations of the other 255 channels
    return Sample("", (features.to(device, dtype), kernels.to(device, dtype)))


def _logits(share: float, B: int = B) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        features = _five_percent(device, dtype, seed, B).args[0]
        held = torch.rand(B, N, H, W, generator=random(seed + 1)) < share
        logits = (
            held.float() - 0.5
        )  # not near 0: the sigmoid of a logit below 6e-8 is 0.5, which eager does not take as set
        return Sample("", (features, logits.to(device, dtype)))

    return make


def _bits_of(
    make: Callable[[torch.device, torch.dtype, int], Sample],
) -> Callable[[torch.device, torch.dtype, int], Sample]:
    def packed(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        features, logits = make(device, dtype, seed).args
        return Sample("", (features, pack_masks(logits, 0.0)))

    return packed


def _blobs(device: torch.device, dtype: torch.dtype, seed: int, B: int = B) -> Sample:
    """Logits of blobs. No logit is so near 0 that eager's sigmoid rounds to 1/2 in a half type."""
    features = _five_percent(device, dtype, seed, B).args[0]
    logits = 8 * (blobs(B * N, H, W, seed, device).reshape(B, N, H, W) - 0.5)
    return Sample("", (features, torch.where(logits.abs() < 0.05, 0.05, logits).to(dtype)))


def _eager_conv(features: Tensor, kernels: Tensor) -> Tensor:
    return torch.einsum("bnc,bchw->bnhw", kernels, features)


def _eager_bits(features: Tensor, kernels: Tensor) -> BitMasks:
    """The released code keeps the bits as bools. They are packed here, because the outputs are compared."""
    return pack_masks(_eager_conv(features, kernels) >= 0)


def _eager_pool(features: Tensor, masks: Tensor) -> Tensor:
    held = (masks.sigmoid() > 0.5).to(features.dtype)
    return torch.einsum("bnhw,bchw->bnc", held, features)


def _eager_update(features: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    logits = _eager_conv(features, kernels)
    return logits, _eager_pool(features, logits)


_floats_of = Prepared(BitMasks.to_dense)


def _eager_pool_of_bits(features: Tensor, masks: BitMasks) -> Tensor:
    return torch.einsum("bnhw,bchw->bnc", _floats_of(masks, features.dtype), features)


_shape = f"B {B}, N {N}, C {C}, {H}x{W}"
_floats = B * P * (C + N) + B * N * C  # features, logits, kernels
_pooled = {
    "flops": 2.0 * B * N * C * P,
    "bytes": 4.0 * B * P * C,
}  # of the product; set bits need as much less as they are fewer
_both = (torch.float32, torch.bfloat16)

_batch = 12  # images on a GPU
_gpu_shape = f"B {_batch}, N {N}, C {C}, {H}x{W}"
_gpu_five_percent = functools.partial(_five_percent, B=_batch)
_gpu_floats = _batch * P * (C + N) + _batch * N * C
_gpu_pooled = {"flops": 2.0 * _batch * N * C * P, "bytes": 4.0 * _batch * P * C}

BENCHES = [
    Bench(
        mask_update, f"{_shape}, 5 % set", _five_percent, _eager_update, dtypes=_both, gradients=("features", "kernels"),
        flops=2.0 * B * N * C * P, bytes=4.0 * (_floats + B * N * C),
        goals={"forward": 2, "forward bfloat16": 3, "full": 1.5, "full bfloat16": 1.5},
    ),
    Bench(
        mask_conv, _shape, _five_percent, _eager_conv, dtypes=_both, gradients=("features", "kernels"),
        flops=2.0 * B * N * C * P, bytes=4.0 * _floats, goals={"forward": 1},
    ),
    Bench(
        mask_bits, f"{_shape}, 5 % set", _five_percent, _eager_bits, vectorised=False, dtypes=_both, flops=2.0 * B * N * C * P,
        bytes=4.0 * B * (P * C + N * C) + B * N * P / 8, goals={"forward": 1},
    ),
    Bench(mask_pool, f"{_shape}, logits, 5 % set", _logits(0.05), _eager_pool, gradients=("features",), **_pooled),
    Bench(mask_pool, f"{_shape}, logits, blobs", _blobs, _eager_pool, gradients=("features",), **_pooled),
    Bench(mask_pool, f"{_shape}, logits, 50 % set", _logits(0.5), _eager_pool, gradients=("features",), **_pooled),
    Bench(mask_pool, f"{_shape}, bits, 5 % set", _bits_of(_logits(0.05)), _eager_pool_of_bits, vectorised=False, **_pooled),
    Bench(mask_pool, f"{_shape}, bits, 50 % set", _bits_of(_logits(0.5)), _eager_pool_of_bits, vectorised=False, **_pooled),
    Bench(
        mask_update, f"{_gpu_shape}, 5 % set", _gpu_five_percent, _eager_update, dtypes=_both, device="cuda",
        gradients=("features", "kernels"), flops=2.0 * _batch * N * C * P, bytes=4.0 * (_gpu_floats + _batch * N * C),
        goals={"forward": 2, "forward bfloat16": 3, "full": 1.5, "full bfloat16": 1.5},
    ),
    Bench(
        mask_conv, _gpu_shape, _gpu_five_percent, _eager_conv, dtypes=_both, device="cuda",
        gradients=("features", "kernels"), flops=2.0 * _batch * N * C * P, bytes=4.0 * _gpu_floats, goals={"forward": 1},
    ),
    Bench(
        mask_bits, f"{_gpu_shape}, 5 % set", _gpu_five_percent, _eager_bits, vectorised=False, dtypes=_both, device="cuda",
        flops=2.0 * _batch * N * C * P, bytes=4.0 * _batch * (P * C + N * C) + _batch * N * P / 8,
    ),
    Bench(
        mask_pool, f"{_gpu_shape}, logits, blobs", functools.partial(_blobs, B=_batch), _eager_pool, dtypes=_both,
        device="cuda", gradients=("features",), **_gpu_pooled,
    ),
    Bench(
        mask_pool, f"{_gpu_shape}, bits, 5 % set", _bits_of(_logits(0.05, _batch)), _eager_pool_of_bits, vectorised=False,
        dtypes=_both, device="cuda", gradients=("features",), **_gpu_pooled,
    ),
]  # fmt: skip
