"""mask_attention."""

from collections.abc import Callable

import torch
from torch import Tensor

from sprompt.masks import BitMasks
from sprompt.ops import mask_attention, pack_masks
from sprompt.testing.spec import Bench, OpSpec, Prepared, Sample, random, refusals, smooth

Make = Callable[[torch.device, torch.dtype, int], Sample]


def _samples(device: torch.device, dtype: torch.dtype, seed: int) -> list[Sample]:
    g = random(seed)

    def heads(B: int, H: int, N: int, D: int, h: int, w: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (torch.randn(B, H, length, D, generator=g) for length in (N, h * w, h * w))
        return query, key, value

    def bits(B: int, N: int, h: int, w: int, density: float) -> BitMasks:
        return pack_masks(torch.rand(B, N, h, w, generator=g) < density)

    sizes = 2, 2, 5, 8, 4, 16
    mixed = torch.rand(2, 5, 4, 16, generator=g) < torch.tensor([0.0, 1.0, 0.1, 0.9, 0.5])[:, None, None]
    mixed[:, 2] = False
    mixed[:, 2, 1, 3] = True
    mixed = pack_masks(mixed)
    scattered, dense = bits(2, 9, 9, 15, 0.06), pack_masks(smooth(14, (3, 4), 9, 15, seed).reshape(2, 7, 9, 15), 0.0)
    transposed = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads(2, 3, 4, 16, 3, 11))
    made = {
        "few bits": (*heads(2, 3, 9, 32, 9, 15), scattered),
        "half of the bits, D odd": (*heads(2, 2, 7, 5, 9, 15), dense),
        "no, all, one, most and half of the bits": (*heads(*sizes), mixed),
        "no masks": (*heads(1, 2, 5, 12, 5, 9), None),
        "masks of all images": (*heads(3, 1, 4, 33, 5, 7), bits(1, 4, 5, 7, 0.3)),
        "one key": (*heads(2, 1, 3, 4, 1, 1), pack_masks(torch.tensor([1, 0, 1]).reshape(1, 3, 1, 1))),
        "transposed heads, dense masks": (*transposed, torch.rand(2, 4, 3, 11, generator=g) < 0.6),
        "several blocks of keys": (*heads(2, 1, 3, 6, 24, 35), pack_masks(smooth(6, (3, 4), 24, 35, seed).reshape(2, 3, 24, 35), 0.4)),
        "one number": (*heads(1, 1, 1, 1, 1, 1), None),
        "no images": (*heads(0, 2, 3, 4, 2, 5), bits(0, 3, 2, 5, 0.5)),
        "no heads": (*heads(2, 0, 3, 4, 2, 5), bits(2, 3, 2, 5, 0.5)),
        "no queries": (*heads(2, 2, 0, 4, 2, 5), bits(2, 0, 2, 5, 0.5)),
        "no keys": (*heads(2, 2, 3, 4, 0, 5), bits(2, 3, 0, 5, 0.5)),
        "no channels": (*heads(2, 2, 3, 0, 2, 5), bits(2, 3, 2, 5, 0.5)),
    }  # fmt: skip
    samples = [Sample(name, args) for name, args in made.items()]
    samples += [
        Sample("empty rows give 0, scale", (*heads(*sizes), mixed), {"empty": "zero", "scale": 1.7}),
        Sample("empty rows give 0, masks of all images", (*heads(*sizes), mixed[:1]), {"empty": "zero", "scale": -0.2}),
    ]
    return [s.map(lambda t: t.to(device, dtype) if t.is_floating_point() else t.to(device)) for s in samples]


_dense = Prepared(lambda masks, empty: _attended(masks.to_dense() if isinstance(masks, BitMasks) else masks, empty))


def _attended(masks: Tensor, empty: str) -> Tensor:
    """bool (B, 1, N, S): the keys of every query."""
    pixels = masks.flatten(2)[:, None]
    return pixels | ~pixels.any(-1, keepdim=True) if empty == "all" else pixels


def _sdpa(
    query: Tensor, key: Tensor, value: Tensor, masks: BitMasks | Tensor | None, *, scale: float | None = None,
    empty: str = "all",
) -> Tensor:  # fmt: skip
    attention = torch.nn.functional.scaled_dot_product_attention
    if masks is None:
        return attention(query, key, value, scale=scale)
    return attention(query, key, value, _dense(masks, empty), scale=scale)


def _oracle(
    query: Tensor, key: Tensor, value: Tensor, masks: BitMasks | Tensor | None, *, scale: float | None = None,
    empty: str = "all",
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention. A query that attends no key gets 0, which torch promises only in newer versions."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query)
    out = _sdpa(query, key, value, masks, scale=scale, empty=empty)
    if masks is None:
        return out
    return torch.where(_dense(masks, empty).any(-1, keepdim=True), out, 0.0)


_q, _k = torch.zeros(2, 3, 4, 8), torch.zeros(2, 3, 6, 8)
_m = BitMasks(torch.zeros(2, 4, 1, dtype=torch.int32), (2, 3))
_bad = refusals(mask_attention)

SPECS = [
    OpSpec(
        mask_attention, _samples, ("mask_attention", "mask_attention_backward"), gradients=("query", "key", "value"),
        oracle=_oracle, autocast="cast",
        errors=(
            _bad("a list", "query must be a tensor, got list", [1], _k, _k, _m, error=TypeError),
            _bad("integers", "key must have dtype float32, .*, got int64", _q, _k.long(), _k, _m, error=TypeError),
            _bad("no heads", r"query must have shape \(B, H, N, D\), got \(3, 4, 8\); split", _q[0], _k, _k, _m),
            _bad("channels differ", r"key must have shape \(B, H, S, D\) with B, H, D of the query", _q, _k[..., 1:], _k, _m),
            _bad("fewer values", r"value must have shape \(B, H, S, D\) = \(2, 3, 6, 8\), got", _q, _k, _k[:, :, 1:], _m),
            _bad("a number", "masks must be a BitMasks or a dense tensor, got int", _q, _k, _k, 3, error=TypeError),
            _bad("a mask too few", r"masks must have batch dimensions \(B, N\) = \(2, 4\) or \(1, N\)", _q, _k, _k, _m[:, 1:]),
            _bad("masks of one image", r"masks must have batch .*, got \(4,\); give one mask per query", _q, _k, _k, _m[0]),
            _bad("another size", "masks must have S = 6 pixels, got 3x3; resize", _q, _k, _k, torch.ones(2, 4, 3, 3)),
            _bad("another device", "masks must be on the device of query", _q, _k, _k, _m.to("meta")),
            _bad("empty", "empty must be one of 'all', 'zero', got 'none'", _q, _k, _k, _m, empty="none"),
            _bad("scale NaN", "scale must be a finite number or None, got nan", _q, _k, _k, _m, scale=float("nan")),
            _bad("scale infinite", "scale must be a finite number or None, got inf", _q, _k, _k, _m, scale=float("inf")),
            _bad("scale a string", "scale must be a finite number or None, got '1'", _q, _k, _k, _m, scale="1", error=TypeError),
        ),
    ),
]  # fmt: skip


# -- benchmarks: 100 queries of 8 heads of 32 channels


def _attention(B: int, h: int, w: int, threshold: float) -> Make:
    """Masks are upsampled noise above a threshold."""

    def make(device: torch.device, dtype: torch.dtype, seed: int) -> Sample:
        g = random(seed)
        query, key, value = (
            torch.randn(B, 8, length, 32, generator=g).to(device, dtype) for length in (100, h * w, h * w)
        )
        masks = smooth(B * 100, (max(h // 8, 2), max(w // 8, 2)), h, w, seed + 1, device).reshape(B, 100, h, w)
        return Sample("", (query, key, value, pack_masks(masks, threshold)))

    return make


def _released(
    query: Tensor, key: Tensor, value: Tensor, masks: BitMasks, *, scale: float | None = None, empty: str = "all"
) -> Tensor:
    """The form of released code: a product, masked_fill, softmax, a product."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.mT)
    scores = scores.masked_fill(~_dense(masks, empty), float("-inf"))
    return torch.matmul(scores.softmax(-1), value)


def _bench(
    B: int, h: int, w: int, threshold: float, share: float, device: str, goals: dict[str, float], trained: bool = True
) -> Bench:
    S, both = h * w, (torch.float32, torch.bfloat16)
    shape = f"B {B}, 8 heads of 32, N 100, S {h}x{w}, {share:.0%} set"
    return Bench(
        mask_attention, shape if trained else f"{shape}, inference", _attention(B, h, w, threshold), _sdpa,
        libraries={"released": _released}, dtypes=both, gradients=("query", "key", "value") if trained else (), device=device,
        flops=share * 4.0 * B * 8 * 100 * S * 32, bytes=4.0 * B * 8 * 32 * (2 * S + 200) + B * 100 * S / 8, goals=goals,
    )  # fmt: skip


BENCHES = [
    _bench(2, 100, 168, 0.95, 0.08, "cpu", {"forward": 8, "full": 5, "released": 25}),
    # With gradients, the peak of every form holds the gradients of 69 MB, so the goal for memory is that of inference.
    _bench(2, 100, 168, 0.95, 0.08, "cpu", {"memory": 10}, trained=False),
    _bench(2, 25, 42, 1.1, 0.08, "cpu", {"forward": 2}),
    _bench(2, 100, 168, 0.0, 0.5, "cpu", {"forward": 1}),
    _bench(12, 100, 168, 0.95, 0.08, "cuda", {}),
    _bench(12, 25, 42, 1.1, 0.08, "cuda", {}),
]
