"""An Ollama Modelfile beside a GGUF file: which template, where a turn ends, which system prompt.

Ollama reads no Jinja. Which of the usual templates a model speaks is found by rendering a small conversation with its
own: the text tells. Without a TEMPLATE Ollama would take plain text, and a model would answer beside the point.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = "halfbyte-question", "halfbyte-answer"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Style:
    """A way in which conversations are written."""

    turn: str
    """The user's turn as it is rendered, and what opens the answer."""
    template: str
    """The same for Ollama, in Go's template language."""
    stop: tuple[str, ...]


STYLES = (
    _Style(
        turn=f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        template=(
            "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
        ),
        stop=("<|im_start|>", "<|im_end|>"),
    ),
    _Style(
        turn=(
            f"<|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        template=(
            "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>{{ end }}"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        stop=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    _Style(
        turn=f"[INST] {QUESTION} [/INST]",
        template=(
            '{{- range .Messages }}{{ if eq .Role "assistant" }} {{ .Content }}</s>{{ else }}[INST] {{ .Content }} '
            "[/INST]{{ end }}{{ end }}"
        ),
        stop=("[INST]", "[/INST]"),
    ),
)


def make_modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerBase, *, system: str | None) -> tuple[str, str | None]:
    """Return the text of a Modelfile, and what to tell where it lacks a template.

    Args:
        gguf_name: The GGUF file, as seen from the Modelfile.
        tokenizer: With the model's chat template.
        system: The system prompt that the model was trained with.
    """
    style = _find_style(tokenizer)
    lines = [f"FROM ./{gguf_name}"]
    note = None
    if style is None:
        note = "its chat template is none that is known here: write a TEMPLATE into the Modelfile"
    else:
        lines += [f'TEMPLATE """{style.template}"""', *(f'PARAMETER stop "{stop}"' for stop in style.stop)]
    if system:
        lines.append('SYSTEM """' + system.replace('"""', '\\"\\"\\"') + '"""')
    return "\n".join(lines) + "\n", note


def _find_style(tokenizer: PreTrainedTokenizerBase) -> _Style | None:
    if not tokenizer.chat_template:
        return None
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return next((style for style in STYLES if isinstance(text, str) and style.turn in text), None)
