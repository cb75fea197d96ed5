"""Compares outputs: integers and bits exactly, floats within a bound that scales with the largest expected value."""

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def tensors(output: Any) -> list[Tensor]:
    """The tensors of any output. BitMasks give their words, None gives no tensor."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def held_bytes(output: Any) -> int:
    """Bytes of the output's tensors, each read or written once. An expanded tensor counts as the memory behind it."""
    return sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors(output))


def error(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and largest expected magnitude. NaN and infinity must be at the same places."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    a, e = actual.double(), expected.double()
    finite = e.isfinite()
    assert torch.equal(a.isfinite(), finite), "NaN or infinity in other places"
    assert torch.equal(a[~finite].nan_to_num(7.0), e[~finite].nan_to_num(7.0)), "other non-finite values"
    if not finite.any():
        return 0.0, 0.0
    return float((a - e)[finite].abs().max()), float(e[finite].abs().max())


def assert_close(actual: Any, expected: Any, relative: float, absolute: float) -> None:
    """Checks that every float tensor is within absolute + relative * max|expected|, and that all other tensors are equal."""
    got, want = tensors(actual), tensors(expected)
    assert len(got) == len(want), f"{len(got)} tensors, expected {len(want)}"
    for place, (a, e) in enumerate(zip(got, want, strict=True)):
        if a.is_floating_point():
            difference, scale = error(a, e)
            bound = absolute + relative * scale
            assert difference <= bound, (
                f"output {place}: off by {difference:.3g}, bound {bound:.3g} (largest value {scale:.3g})"
            )
        else:
            assert a.dtype == e.dtype, f"output {place}: dtype {a.dtype}, expected {e.dtype}"
            assert a.shape == e.shape, f"output {place}: shape {tuple(a.shape)}, expected {tuple(e.shape)}"
            assert torch.equal(a, e), f"output {place}: {int((a != e).sum())} of {a.numel()} entries differ"


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Checks for the same bits in every tensor (all NaN count as equal), and for equal strings, bytes and whole numbers (RLEs
    hold no tensors)."""
    got, want = tensors(actual), tensors(expected)
    assert len(got) == len(want), f"{len(got)} tensors, expected {len(want)}"
    for place, (a, e) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape, (
            f"output {place}: {a.dtype} {a.shape}, expected {e.dtype} {e.shape}"
        )
        assert torch.equal(
            a.nan_to_num(7.0) if a.is_floating_point() else a, e.nan_to_num(7.0) if e.is_floating_point() else e
        ), f"output {place}: {int((a != e).sum())} of {a.numel()} entries differ"
    said, wanted = ([x for x in pytree.tree_leaves(o) if isinstance(x, str | bytes | int)] for o in (actual, expected))
    assert said == wanted, "values beside the tensors differ"
