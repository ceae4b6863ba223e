"""HTML and SVG as text that cannot go wrong: what is no markup yet is escaped, everywhere and without being asked.

`element("p", words)` escapes `words`; what another `element` returned passes. Data of a run never becomes markup.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable

# Control characters, which HTML forbids, and halves of surrogate pairs, which UTF-8 cannot write.
UNWRITABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
VOID_ELEMENTS = frozenset({"meta", "br", "hr"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def escape(text: object) -> Markup:
    """Return text as HTML shows it; markup stays as it is."""
    if isinstance(text, Markup):
        return text
    lines = str(text).replace("\r\n", "\n")
    return Markup(html.escape(UNWRITABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), lines)))


def join(parts: Iterable[object]) -> Markup:
    """Return parts one after the other, those that are no markup escaped."""
    return Markup("".join(escape(part) for part in parts))


def element(name: str, /, *content: object, **attributes: object) -> Markup:
    """Return an element.

    Args:
        name: Of the element.
        content: What is in it, text or markup.
        attributes: By name; `class_` is class, `aria_label` is aria-label. Those that are None are left out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_compact(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in VOID_ELEMENTS:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(content)}</{name}>")


def _compact(value: object) -> object:
    """Return numbers of pixels with no more digits than a screen shows."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value
