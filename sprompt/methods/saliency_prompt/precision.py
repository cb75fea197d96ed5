"""Full float32 precision, independent of torch's switches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Computes convolutions and matrix products of float32 in full float32, without autocast, in its block.

    With tf32 or bfloat16, values close to a threshold would fall on the other side. Torch has two generations of switches; they
    must agree when an old one is read. Both are restored at the end of the block.
    """
    switches = _switches()
    before = [getattr(switch, name) for switch, name, _ in switches]
    products = None
    with suppress(RuntimeError):  # raised if the user set switches of the new generation only
        products = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        for switch, name, exact in switches:
            setattr(switch, name, exact)
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if products is not None:
            torch.set_float32_matmul_precision(products)
        for (switch, name, _), value in zip(switches, before, strict=True):
            setattr(switch, name, value)


def _switches() -> list[tuple[Any, str, Any]]:
    """(owner of a switch, its name, its value for full float32) of each switch."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return [(backends.cudnn, "allow_tf32", False)]
    owners = [backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv]
    return [(owner, "fp32_precision", "ieee") for owner in owners]
