"""What a Jinja chat template comes to for plain conversations, and the same as a template in Ollama's Go.

A small conversation whose words cannot occur in the template is rendered, and the text is cut at those words:

    start user_open USER answer_open answer_lead ANSWER answer_close user_open USER answer_open

The system prompt has a turn of its own in front (ChatML, Llama 3), or stands in the first user turn (Llama 2) or in the
last (Mistral). For a template that takes none it is put into the first, as training does it. Some templates have a
system prompt of their own, which conversations without one get.

What a template does besides (tools, thinking) does not show in this, so other conversations are rendered with both. If
one comes out differently the template is not made of such turns, and there is no style.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from halfbyte.data.chat import ChatTemplate, TemplateRefusalError
from halfbyte.data.examples import Message
from halfbyte.export.gguf_vocabulary import adds_bos

_SYSTEM, _USER, _ANSWER = "qzsystemzq", "qzuserzq", "qzanswerzq"
# In Ollama's list the system prompt, if any, comes first, so that the first user turn is number 0 or 1.
_IS_FIRST, _IS_LAST = "(le $i 1)", "(eq (len (slice $.Messages $i)) 1)"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TurnStyle:
    """How conversations are written, as the texts around the words."""

    start: str
    """The begin token, where the template writes it and the tokenizer does not."""
    user_open: str
    answer_open: str
    answer_lead: str
    """What stands before an earlier answer beyond `answer_open`: Mistral's models write that space themselves."""
    answer_close: str
    system_place: Literal["own turn", "first user turn", "last user turn"]
    system_open: str
    system_close: str
    default_system: str | None = None
    """The system prompt of conversations without one, where the template has one; may be empty."""

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation that ends with a user turn, up to where the answer begins."""
        system = self.default_system
        if messages[0]["role"] == "system":
            system, messages = messages[0]["content"], messages[1:]
        written = "" if system is None else f"{self.system_open}{system}{self.system_close}"
        folded_at = {"own turn": None, "first user turn": 0, "last user turn": len(messages) - 1}[self.system_place]
        text = self.start + written if folded_at is None else self.start
        for number, message in enumerate(messages):
            if message["role"] == "user":
                folded = written if number == folded_at else ""
                text += f"{self.user_open}{folded}{message['content']}{self.answer_open}"
            else:
                text += f"{self.answer_lead}{message['content']}{self.answer_close}"
        return text

    def go_template(self) -> str:
        """Return the same in Go's template language, with Ollama's names."""
        system = f"{self.system_open}{{{{ $.System }}}}{self.system_close}"
        before, folded = "", ""
        if self.system_place != "own turn":
            where = _IS_FIRST if self.system_place == "first user turn" else _IS_LAST
            folded = f"{{{{ if and $.System {where} }}}}{system}{{{{ end }}}}"
        elif self.default_system is None:
            before = f"{{{{ if $.System }}}}{system}{{{{ end }}}}"
        else:
            before = system
        user = f"{self.user_open}{folded}{{{{ .Content }}}}{self.answer_open}"
        # An answer that ends the conversation is one to be continued.
        answer = f"{self.answer_lead}{{{{ .Content }}}}{{{{ if not {_IS_LAST} }}}}{self.answer_close}{{{{ end }}}}"
        return (
            f"{self.start}{before}{{{{ range $i, $_ := .Messages }}}}"
            f'{{{{ if eq .Role "user" }}}}{user}{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
            "{{ end }}"
        )


def find_turn_style(template: ChatTemplate) -> TurnStyle | None:
    """Return how a chat template writes conversations; None where they are not made of turns all alike."""
    try:
        style = _cut(template)
        if style is None or any("{{" in str(text) for text in dataclasses.astuple(style)):
            return None
        samples = [_conversation(turns, words=words) for turns in (1, 2, 3) for words in ("", "other ")]
        if template.takes_system:
            samples += [[_turn("system", "Be kind."), *sample] for sample in samples]
        return style if all(_prompt(template, sample) == style.render(sample) for sample in samples) else None
    except TemplateRefusalError:
        return None


def _cut(template: ChatTemplate) -> TurnStyle | None:
    start = _start(template)
    bare, rest = _prompt(template, _conversation(2)).removeprefix(start).split(_USER, 1)
    before_answer, found, rest = rest.partition(_ANSWER)
    between, found_again, answer_open = rest.partition(_USER)
    if not (found and found_again and before_answer.startswith(answer_open)):
        return None
    if between.endswith(bare):
        user_open = bare
    else:
        # Something stands before the first turn. What ends an answer tells where the next turn begins.
        user_open = between.partition((template.end_of_turn or "").strip() or between)[2].lstrip()
    answer_close = between.removesuffix(user_open)
    turns: dict[str, Any] = {
        "start": start,
        "user_open": user_open,
        "answer_open": answer_open,
        "answer_lead": before_answer.removeprefix(answer_open),
        "answer_close": answer_close,
    }
    if not template.takes_system:
        # Training puts the system prompt there, see `data.render`.
        return TurnStyle(**turns, system_place="first user turn", system_open="", system_close="\n\n")
    return _with_system(template, turns, bare)


def _with_system(template: ChatTemplate, turns: dict[str, Any], bare: str) -> TurnStyle | None:
    """Return the style with the system prompt, found in a conversation of two user turns."""
    user_open = turns["user_open"]
    asked = _prompt(template, [_turn("system", _SYSTEM), *_conversation(2)]).removeprefix(turns["start"])
    before, _, after = asked.partition(_SYSTEM)
    between = after.partition(_USER)[0]
    if _USER in before:
        opened = before.rpartition(user_open)[2]
        return TurnStyle(**turns, system_place="last user turn", system_open=opened, system_close=between)
    if not user_open or not between.endswith(user_open):
        opened = before.removeprefix(user_open)
        return TurnStyle(**turns, system_place="first user turn", system_open=opened, system_close=between)
    default = None
    if bare != user_open:
        # A conversation without a system prompt has the template's own.
        default = bare.removeprefix(before).removesuffix(between)
    return TurnStyle(
        **turns,
        system_place="own turn",
        system_open=before,
        system_close=between.removesuffix(user_open),
        default_system=default,
    )


def _start(template: ChatTemplate) -> str:
    """Return the begin token if a prompt begins with it and nobody else writes it."""
    bos = template.tokenizer.bos_token
    return bos if isinstance(bos, str) and _prompt(template, _conversation(1)).startswith(bos) else ""


def _prompt(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """Return what Ollama must write for a conversation: what llama.cpp puts in front of every text is left out."""
    text = template.render(messages, add_generation_prompt=True)
    bos = template.tokenizer.bos_token if adds_bos(template.tokenizer) else None
    return text.removeprefix(bos) if isinstance(bos, str) else text


def _conversation(turns: int, *, words: str = "") -> list[Message]:
    """Return a conversation of some user turns with an answer between each two."""
    messages = []
    for _ in range(turns):
        messages += [_turn("user", words + _USER), _turn("assistant", words + _ANSWER)]
    return messages[:-1]


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}
