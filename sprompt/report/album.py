"""The picture files of a page: a small one for the sheet, and a large one for the closer view."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from sprompt.atomic import atomic_write
from sprompt.report.page import Child, Html, tag

_SMALL = 640  # long side on the sheet, in pixels
_OURS = re.compile(r"[a-z]+-\d{3,}(-[a-z]+)?\.(jpg|png)")


class Album:
    """The folder `pictures` beside a page. Links are relative, so page and folder can be moved together."""

    def __init__(self, out: Path) -> None:
        self._folder = out / "pictures"
        self._names: set[str] = set()

    def shot(
        self, name: str, picture: Image.Image, alt: str, *, plain: Image.Image | None = None, title: str = ""
    ) -> Html:
        """A link to the picture; it shows a small copy. `plain` is the picture without masks, `title` a label on the copy."""
        full = self._store(f"{name}.jpg", picture)
        small = picture.copy()
        small.thumbnail((_SMALL, _SMALL), Image.Resampling.LANCZOS, reducing_gap=3.0)
        source = self._store(f"{name}-small.jpg", small)
        under = None if plain is None else self._store(f"{name}-plain.jpg", plain)
        image = tag(
            "img", src=source, alt=alt, width=small.width, height=small.height, loading="lazy", decoding="async"
        )
        return tag("a", image, tag("i", title) if title else None, href=full, data_full=True, data_plain=under)

    def map(self, name: str, picture: Image.Image, alt: str) -> Html:
        """A link to a small map. The closer view shows its pixels without smoothing."""
        source = self._store(f"{name}.png", picture)
        image = tag("img", src=source, alt=alt, width=picture.width, height=picture.height, loading="lazy")
        return tag("a", image, href=source, data_full=True, data_pixels=True)

    def clear(self) -> None:
        """Removes the pictures of an earlier page that this page does not have."""
        if self._folder.is_dir():
            for path in self._folder.iterdir():
                if path.name not in self._names and _OURS.fullmatch(path.name):
                    path.unlink(missing_ok=True)

    def _store(self, name: str, picture: Image.Image) -> str:
        file = BytesIO()
        if name.endswith(".png"):
            picture.save(file, "PNG", optimize=True)
        else:
            picture.convert("RGB").save(file, "JPEG", quality=87, subsampling=0)
        atomic_write(self._folder / name, file.getvalue())
        self._names.add(name)
        return f"pictures/{name}"


def figure(shots: Sequence[Html], ratio: float, title: str, caption: Child, kinds: str | None = None) -> Html:
    """A figure of the sheet: one picture, or several of one size side by side. `ratio` is width / height of the whole row."""
    body = tag("div", shots, class_="shots")
    head = tag("span", title, class_="name", title=title)
    return tag(
        "figure", body, tag("figcaption", head, caption), style=f"--ar:{min(max(ratio, 0.3), 6):.3f}",
        data_title=title, data_kinds=kinds,
    )  # fmt: skip


def dot(colour: str, style: str = "solid") -> Html:
    return tag("span", class_=f"dot {style}", style=f"--c:{colour}")
