"""An Ollama Modelfile beside a GGUF file: where the weights are, how a conversation is written, where answers end.

Ollama writes conversations by a template in Go's language. See `turn_style` for how it is derived from the model's own
Jinja template, and when it is not.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.data.chat import ChatTemplate, find_chat_template
from halfbyte.export.folder import new_file
from halfbyte.export.turn_style import find_turn_style

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_TEMPLATE = "the Modelfile has no TEMPLATE, because {}: look at what Ollama makes of conversations, or write one"
_UNQUOTABLE = "the Modelfile has no {}: the text {}"
# A quoted text ends where three quotes end a line; there is no way to write them there.
_CLOSING = re.compile(r'"""[ \t]*[\r\n]')


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Modelfile:
    """The text of a Modelfile; `save` writes it."""

    text: str
    notes: tuple[str, ...] = ()
    """What it does not say, and why."""

    def save(self, path: str | Path) -> None:
        """Write it.

        Raises:
            ConfigError: Something is at `path`.
        """
        with new_file(Path(path)) as temporary:
            temporary.write_text(self.text, encoding="utf-8")


def make_modelfile(
    folder: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    weights: str | Path,
    adapter: str | Path | None = None,
    system: str | None = None,
) -> Modelfile:
    """Return the Modelfile for a model.

    Args:
        folder: Where it will lie; files in the same folder are named relative to it.
        tokenizer: The model's, with its chat template.
        weights: GGUF file or folder of the model.
        adapter: GGUF file of an adapter.
        system: System prompt of conversations that have none; None for the chat template's own.
    """
    template = find_chat_template(tokenizer) if tokenizer.chat_template else None
    style = None if template is None else find_turn_style(template)
    lines, notes = [f"FROM {_named_from(folder, weights)}"], []
    if adapter is not None:
        lines.append(f"ADAPTER {_named_from(folder, adapter)}")
    texts = {}
    if style is None:
        reason = "the model has no chat template" if template is None else "the chat template's turns are not all alike"
        notes.append(_NO_TEMPLATE.format(reason))
    else:
        texts["TEMPLATE"] = style.go_template()
        system = system or style.default_system
    if system:
        texts["SYSTEM"] = system
    for instruction, text in texts.items():
        problem = _why_unquotable(text)
        if problem is None:
            lines.append(f'{instruction} """{text}"""')
        else:
            notes.append(_UNQUOTABLE.format(instruction, problem))
    lines += [f'PARAMETER stop "{text}"' for text in _stop_texts(tokenizer, template)]
    return Modelfile(text="\n".join(lines) + "\n", notes=tuple(notes))


def _named_from(folder: str | Path, target: str | Path) -> str:
    target = Path(target).absolute()
    return f"./{target.name}" if target.parent == Path(folder).absolute() else str(target)


def _why_unquotable(text: str) -> str | None:
    """Return why a text cannot stand in a Modelfile, None where it can."""
    if _CLOSING.search(text):
        return 'has a line that ends with """'
    dropped = [letter for letter in text if not letter.isprintable() and letter not in "\n\r\t"]
    return f"holds {dropped[0]!r}, which Ollama drops" if dropped else None


def _stop_texts(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None) -> list[str]:
    end_of_turn = (template.end_of_turn or "").strip() if template else ""
    return [text for text in dict.fromkeys((end_of_turn, tokenizer.eos_token)) if text]
