"""What is found out about a template by trying it, and the built-in ones."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.data.chat import BUILT_IN_TEMPLATES, ChatTemplate, TemplateRefusalError, find_chat_template
from halfbyte.errors import DataError
from tests.data.conftest import make_byte_level, with_family
from tests.data.templates import CHATML, FAMILIES, MARKS_EVERYTHING, NO_END

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "On its way."},
]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_chat_template_finds_the_facts(byte_level: PreTrainedTokenizerFast, family: str) -> None:
    facts = FAMILIES[family]
    template = find_chat_template(with_family(byte_level, facts))
    assert template.end_of_turn == facts.end_of_turn
    assert template.closing == facts.closing
    assert template.takes_system == facts.takes_system
    assert template.has_markers == ("{% generation" in facts.template)


def test_chat_template_does_not_trust_markers_around_everything(byte_level: PreTrainedTokenizerFast) -> None:
    assert not ChatTemplate(byte_level, text=MARKS_EVERYTHING, origin="x").has_markers


def test_chat_template_finds_that_nothing_ends_a_turn(byte_level: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(byte_level, text=NO_END, origin="x")
    assert (template.end_of_turn, template.closing) == ("", "\n")


def test_chat_template_finds_that_words_are_changed(byte_level: PreTrainedTokenizerFast) -> None:
    text = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    assert ChatTemplate(byte_level, text=text, origin="x").end_of_turn is None


def test_chat_template_finds_that_system_turns_are_left_out(byte_level: PreTrainedTokenizerFast) -> None:
    text = "{% for m in messages if m.role != 'system' %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    assert not ChatTemplate(byte_level, text=text, origin="x").takes_system


@pytest.mark.parametrize("text", ["{{ raise_exception('never') }}", "{{ messages[0].content + none }}", "{% if %}"])
def test_render_explains_a_refusal(byte_level: PreTrainedTokenizerFast, text: str) -> None:
    with pytest.raises(TemplateRefusalError, match="the chat template does not take this conversation: "):
        ChatTemplate(byte_level, text=text, origin="x").render(TALK)


def test_find_chat_template_builds_chatml_where_its_tokens_exist(byte_level: PreTrainedTokenizerFast) -> None:
    template = find_chat_template(byte_level)
    assert template.origin == "the built-in 'chatml' (the tokenizer has none)"
    assert template.render(TALK) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nWhere is it?<|im_end|>\n"
        "<|im_start|>assistant\nOn its way.<|im_end|>\n"
    )
    assert template.render(TALK[:2], add_generation_prompt=True).endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_find_chat_template_builds_headings_with_the_end_token(byte_level: PreTrainedTokenizerFast) -> None:
    template = find_chat_template(byte_level, "headings")
    assert template.origin == "the built-in 'headings' (as asked for)"
    assert template.render(TALK) == ("Be kind.\n\n### User:\nWhere is it?\n\n### Assistant:\nOn its way.</s>\n\n")
    assert template.render(TALK[:2], add_generation_prompt=True).endswith("Where is it?\n\n### Assistant:\n")
    assert (template.end_of_turn, template.closing) == ("</s>", "\n\n")


@pytest.mark.parametrize("name", sorted(BUILT_IN_TEMPLATES))
def test_find_chat_template_starts_as_the_tokenizer_does(name: str) -> None:
    assert find_chat_template(make_byte_level(adds_bos=True), name).render(TALK).startswith("<s>")
    assert not find_chat_template(make_byte_level(), name).render(TALK).startswith("<s>")


def test_find_chat_template_takes_text_path_and_name(byte_level: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(CHATML, encoding="utf-8")
    byte_level.chat_template = {"default": "{{ 'd' }}", "short": "{{ 's' }}"}
    assert find_chat_template(byte_level, CHATML).text == CHATML
    assert find_chat_template(byte_level, str(path)).text == CHATML
    assert find_chat_template(byte_level, "short").render(TALK) == "s"
    assert find_chat_template(byte_level).render(TALK) == "d"


def test_find_chat_template_explains_what_is_wrong(byte_level: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"'nowhere\.jinja' is no Jinja template .* none of: chatml, headings"):
        find_chat_template(byte_level, "nowhere.jinja")
    byte_level.chat_template = {"short": "{{ 's' }}", "long": "{{ 'l' }}"}
    with pytest.raises(DataError, match=r"several chat templates: long, short\. Choose one"):
        find_chat_template(byte_level)
    byte_level.chat_template = None
    byte_level.eos_token = None
    with pytest.raises(DataError, match="could never learn to stop"):
        find_chat_template(byte_level, "headings")
