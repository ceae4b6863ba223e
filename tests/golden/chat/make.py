"""Write spans.json: for every family of chat templates, what is learned of one conversation.

Run as `python -m tests.golden.chat.make`, then read the difference by eye: `[["text", is_learned], ...]` for each
training text. Made with transformers 5.23.0 and tokenizers 0.23.3.
"""

from __future__ import annotations

import json
from pathlib import Path

from halfbyte.data.examples import Example
from halfbyte.data.render import build_renderer
from halfbyte.data.report import token_spans
from tests.data.conftest import TOKENIZERS, with_family
from tests.data.templates import FAMILIES

PATH = Path(__file__).with_name("spans.json")
EXAMPLE = Example(
    origin="golden",
    messages=(
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where is my order?"},
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "Really? \U0001f600"},
        {"role": "assistant", "content": "Yes,\n\ntomorrow."},
    ),
)


def render_family(family: str, kind: str) -> list[list[list[str | bool]]]:
    """Return the pieces of each training text of a family with one kind of tokenizer."""
    tokenizer = with_family(TOKENIZERS[kind](), FAMILIES[family])
    rendered = build_renderer(tokenizer).render(EXAMPLE)
    return [[[span.text, span.is_trained] for span in token_spans(tokenizer, made)] for made in rendered]


if __name__ == "__main__":
    spans = {family: render_family(family, "byte_level") for family in FAMILIES}
    PATH.write_text(json.dumps(spans, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
