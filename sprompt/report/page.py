"""HTML that is escaped by construction, and the page around it: one file that loads nothing from a network."""

from __future__ import annotations

import base64
import hashlib
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from sprompt.atomic import atomic_write
from sprompt.report.style import SCRIPT, STYLE

MARK = '<meta name="generator" content="sprompt">'  # marks an index.html as written by this package
_VOID = frozenset(("br", "hr", "img", "input", "meta", "link", "line", "path", "polyline", "rect", "circle"))
_ICON = (
    "data:image/svg+xml,%3Csvg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 16 16'%3E%3Crect width='16' height='16' rx='4' "
    "fill='%230a7d68'/%3E%3Cpath d='M4 8a4 4 0 1 1 8 0 4 4 0 0 1-8 0' fill='none' stroke='white' stroke-width='2'/%3E%3C/svg%3E"
)


class Html(str):
    """Text that is already HTML, so it is not escaped again."""


Child: TypeAlias = "str | int | float | Sequence[Child] | None"


def tag(name: str, /, *children: Child, **attributes: Any) -> Html:
    """<name attributes>children</name>. Attributes are always escaped; children are escaped unless they are `Html`.

    In the name of an attribute an underscore becomes a hyphen, and a last underscore is dropped (aria_label, class_). The value
    True writes the bare name; None and False leave the attribute out.
    """
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        written.append(f" {key}" if value is True else f' {key}="{html.escape(str(value))}"')
    start = f"<{name}{''.join(written)}>"
    if name in _VOID:
        return Html(start[:-1] + "/>")
    return Html(f"{start}{join(*children)}</{name}>")


def join(*children: Child) -> Html:
    """The children one after the other; children that are not `Html` are escaped."""
    return Html("".join(_written(child) for child in children))


def _written(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return str.__str__(child)
    if isinstance(child, (str, int, float)):
        return html.escape(str(child))
    return join(*child)


@dataclass(frozen=True)
class Section:
    """A part of the page with a link in the navigation."""

    anchor: str
    title: str
    body: Html
    note: str = ""  # short text beside the title, such as a number
    missing: bool = False  # true: there is no input, and the body says how to make it


def check_place(out: Path) -> None:
    """Raises ValueError if out is a file, or if out/index.html is a page of another program: no page can be written there."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: must be a folder, got a file; choose another")
    page = out / "index.html"
    if page.exists() and MARK.encode() not in page.read_bytes()[:4096]:
        raise ValueError(f"{page}: is a page of another program and is not overwritten; choose another folder")


def write_page(path: Path, title: str, lead: Child, sections: Sequence[Section], footer: Child) -> Path:
    """Writes the page at `path`, whole or not at all."""
    present = [section for section in sections if not section.missing]
    absent = [section for section in sections if section.missing]
    links = [tag("a", section.title, href=f"#{section.anchor}") for section in present]
    if absent:
        links.append(tag("a", "Not here yet", href="#missing", class_="quiet"))
    nav = tag("nav", tag("div", links, class_="wide"), aria_label="Sections")
    head = tag("header", tag("div", tag("h1", title), tag("p", lead, class_="lead"), class_="wide"))
    parts = [
        tag(
            "section",
            tag("h2", section.title, tag("small", section.note) if section.note else None),
            section.body,
            id=section.anchor,
        )
        for section in present
    ]
    if absent:
        rows = [tag("div", tag("dt", s.title), tag("dd", s.body)) for s in absent]
        intro = tag("p", "These sections had no input. Here is how to make it:", class_="note")
        parts.append(tag("section", tag("h2", "Not here yet"), intro, tag("dl", rows, class_="missing"), id="missing"))
    body = join(
        tag("a", "Skip to the pictures", href="#main", class_="skip"), head, nav,
        tag("main", parts, id="main", class_="wide", tabindex="-1"),
        tag("footer", tag("div", footer, class_="wide")), _LIGHTBOX, Html(f"<script>{SCRIPT}</script>"),
    )  # fmt: skip
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"script-src 'sha256-{digest}'; connect-src 'none'; object-src 'none'; base-uri 'none'; form-action 'none'"
    text = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        + tag("meta", http_equiv="Content-Security-Policy", content=policy)
        + '<meta name="viewport" content="width=device-width, initial-scale=1">'
        + '<meta name="color-scheme" content="light dark"><meta name="referrer" content="no-referrer">'
        + MARK
        + tag("title", title)
        + tag("link", rel="icon", href=_ICON)
        + f"\n<style>{STYLE}</style></head>\n<body>"
        + body
        + "</body></html>\n"
    )
    atomic_write(path, text.encode("utf-8", "replace"))
    return path


_LIGHTBOX = tag(
    "dialog",
    tag(
        "div",
        tag("p", aria_live="polite"),
        tag("button", "plain", type="button", data_act="plain", aria_pressed="false", title="Without masks (m)"),
        tag("button", "‹", type="button", data_act="back", aria_label="Previous picture"),
        tag("button", "›", type="button", data_act="next", aria_label="Next picture"),
        tag("button", "×", type="button", data_act="close", aria_label="Close"),
        class_="controls",
    ),
    tag("div", class_="stage"),
    aria_label="Picture",
)
