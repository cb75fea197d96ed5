"""The time that the parts of some work take."""

from __future__ import annotations

import time

import torch


class Clock:
    """Seconds of the parts of some work of this process, such as reading, the network, and files."""

    def __init__(self) -> None:
        self.parts: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        self._since = time.monotonic()

    def lap(self, part: str, device: torch.device | None = None) -> None:
        """Adds the time since the last lap to a part. A lap waits for the work of a device."""
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.monotonic()
        self.parts[part] = self.parts.get(part, 0.0) + now - self._since
        self._since = now

    def rates(self, count: int, what: str) -> str:
        """How many of `count` pieces of work each part would do in a second if there were no other part."""
        each = ", ".join(f"{part} {count / max(seconds, 1e-9):.3g}" for part, seconds in self.parts.items())
        return f"{what} a second by part: {each}"

    def summary(self, pictures: int) -> str:
        """Pictures a second, and the share of each part."""
        whole = max(sum(self.parts.values()), 1e-9)
        shares = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in self.parts.items())
        return f"{pictures / whole:.3g} pictures a second ({shares})"
