"""Markers that a chat template writes, and which of them the tokenizer splits.

A marker such as <|im_start|> tells the model where a turn begins. Split into `<`, `|`, `im`, ... it is learned far more
slowly, and costs half a dozen tokens at each turn. It must be a token of its own, which a base model's tokenizer need
not have.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from halfbyte.data.chat import TemplateRefusalError, find_chat_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# <|im_start|>, <start_of_turn>, [INST], [/INST]
_MARKER = re.compile(r"<\|[^|<>\s]+\|>|</?[a-z]+(?:_[a-z]+)+>|\[/?[A-Z][A-Z_]+\]")
_PROBE = (
    {"role": "system", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "c"},
    {"role": "user", "content": "d"},
)


def find_split_markers(tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> list[str]:
    """Return the markers of the chat template that are more than one token, in the order of their use.

    Args:
        tokenizer: The model's.
        chat_template: As for `find_chat_template`.

    Raises:
        DataError: There is no such template.
    """
    template = find_chat_template(tokenizer, chat_template)
    messages = _PROBE if template.takes_system else _PROBE[1:]
    try:
        text = template.render(messages, add_generation_prompt=True)
    except TemplateRefusalError:
        return []
    found = dict.fromkeys(_MARKER.findall(text))
    return [marker for marker in found if len(tokenizer(marker, add_special_tokens=False)["input_ids"]) > 1]
