"""float32 all through, whatever torch's switches allow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Convolutions and products of float32 in float32, without autocast: thresholds turn over with tf32 and bfloat16.

    Torch has two generations of switches, which must agree where an old one is read; both are put back as they were.
    """
    switches = _switches()
    before = [getattr(switch, name) for switch, name, _ in switches]
    products = None
    with suppress(RuntimeError):  # the user set a new one only
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
    """Where a switch is, its name, and its value for float32."""
    backends: Any = torch.backends
    if not hasattr(backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return [(backends.cudnn, "allow_tf32", False)]
    owners = [backends.cudnn.conv, backends.cuda.matmul, backends.mkldnn.matmul, backends.mkldnn.conv]
    return [(owner, "fp32_precision", "ieee") for owner in owners]
