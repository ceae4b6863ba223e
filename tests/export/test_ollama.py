"""Modelfiles, and Go templates checked by what Ollama's rules would make of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.data.chat import find_chat_template
from halfbyte.errors import ConfigError
from halfbyte.export.ollama import make_modelfile
from halfbyte.export.turn_style import find_turn_style
from tests.data.templates import FAMILIES
from tests.export.llama_cpp import CHATML, build_byte_level

LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '<tool>\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<tool>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set loop_messages = messages[1:] %}{% else %}{% set loop_messages = messages %}{% endif %}"
    "{% for m in loop_messages %}{% if m['role'] == 'user' %}"
    "{% if loop.WHERE and system is defined %}{{ '[INST] ' + system + '\n\n' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}{% endif %}" + CHATML
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
COUNTING = "{% for m in messages %}{{ loop.index | string + m['role'] + m['content'] }}{% endfor %}"
STYLES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "mistral-first": MISTRAL.replace("WHERE", "first"),
    "mistral-last": MISTRAL.replace("WHERE", "last"),
    "default": WITH_DEFAULT,
    "no-system": NO_SYSTEM,
}


def tokenizer_with(template: str | None, *, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    tokenizer = build_byte_level(adds_bos=adds_bos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", [*STYLES, *FAMILIES])
@pytest.mark.parametrize("system", [None, "Answer in rhyme."])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_go_template_writes_what_the_jinja_template_does(name: str, system: str | None, adds_bos: bool) -> None:
    tokenizer = tokenizer_with(STYLES.get(name) or FAMILIES[name].template, adds_bos=adds_bos)
    template = find_chat_template(tokenizer)
    style = find_turn_style(template)
    assert style is not None
    effective = system or style.default_system
    for turns in (1, 2, 3):
        talk = [{"role": ("user", "assistant")[i % 2], "content": f"words {i}"} for i in range(2 * turns - 1)]
        asked = [{"role": "system", "content": system}, *talk] if system else talk
        if system and not template.takes_system:
            # What halfbyte trains on: a template that takes no system prompt, or drops it when the conversation is
            # finished, gets it in front of the first question.
            asked = [{"role": "user", "content": f"{system}\n\nwords 0"}, *talk[1:]]
        expected = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
        expected = expected.removeprefix("<s>") if adds_bos else expected
        for has_turn in (True, False) if effective else (False,):
            messages = [{"role": "system", "content": effective or ""}] * has_turn + talk
            assert run_go(style.go_template(), messages, effective or "") == expected


def test_make_modelfile_says_everything(tmp_path: Path) -> None:
    made = make_modelfile(tmp_path, tokenizer_with(CHATML), weights=tmp_path / "m.gguf", system="Be kind.")
    made.save(tmp_path / "m.Modelfile")
    text = (tmp_path / "m.Modelfile").read_text()
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """{{ if $.System }}<|im_start|>system\n{{ $.System }}<|im_end|>\n')
    assert text.endswith('"""\nSYSTEM """Be kind."""\nPARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n')
    assert made.notes == ()
    with pytest.raises(ConfigError, match="exists"):
        made.save(tmp_path / "m.Modelfile")


def test_make_modelfile_names_an_adapter_and_takes_the_templates_own_system(tmp_path: Path) -> None:
    made = make_modelfile(tmp_path, tokenizer_with(WITH_DEFAULT), weights="/models/base", adapter=tmp_path / "a.gguf")
    assert made.text.startswith("FROM /models/base\nADAPTER ./a.gguf\n")
    assert 'SYSTEM """Be brief."""\n' in made.text


@pytest.mark.parametrize(("template", "reason"), [(COUNTING, "not all alike"), (None, "no chat template")])
def test_make_modelfile_notes_what_it_leaves_out(template: str | None, reason: str, tmp_path: Path) -> None:
    made = make_modelfile(tmp_path, tokenizer_with(template), weights=tmp_path / "m.gguf")
    assert "TEMPLATE" not in made.text
    assert "PARAMETER stop" in made.text
    assert reason in made.notes[0]


@pytest.mark.parametrize(
    ("system", "reason"), [('say """\nonly', 'a line that ends with """'), ("no\u00a0break", "which Ollama drops")]
)
def test_make_modelfile_leaves_out_what_cannot_be_quoted(system: str, reason: str, tmp_path: Path) -> None:
    made = make_modelfile(tmp_path, tokenizer_with(CHATML), weights="m.gguf", system=system)
    assert "\nSYSTEM" not in made.text
    assert made.notes[0].startswith("the Modelfile has no SYSTEM")
    assert reason in made.notes[0]


@pytest.mark.parametrize("system", ['Say "no"', 'Quote with """ or """'])
def test_make_modelfile_quotes_as_ollama_reads(system: str, tmp_path: Path) -> None:
    text = make_modelfile(tmp_path, tokenizer_with(CHATML), weights="m.gguf", system=system).text
    assert read_modelfile(text)["SYSTEM"] == system


def read_modelfile(text: str) -> dict[str, str]:
    """Read instructions by Ollama's rules: a quoted value ends with the line that its closing quotes end."""
    found, open_name, value = {}, "", ""
    for line in text.splitlines():
        name, _, rest = (open_name, "", line) if open_name else line.partition(" ")
        value = f"{value}\n{rest}" if open_name else rest
        is_open = value.startswith('"""') and not (len(value) >= 6 and value.rstrip().endswith('"""'))
        open_name = name if is_open else ""
        if not is_open:
            found[name] = value.rstrip()[3:-3] if value.startswith('"""') else value
    return found


def run_go(template: str, messages: list[dict[str, str]], system: str) -> str:
    """Run the part of Go's template language that is used, by way of Jinja's words for it."""
    import jinja2

    words = {
        "range $i, $_ := .Messages": "% for m in messages %",
        'if eq .Role "user"': "% if m.role == 'user' %",
        'else if eq .Role "assistant"': "% elif m.role == 'assistant' %",
        "if not (eq (len (slice $.Messages $i)) 1)": "% if not loop.last %",
        "if and $.System (le $i 1)": "% if system and loop.index0 <= 1 %",
        "if and $.System (eq (len (slice $.Messages $i)) 1)": "% if system and loop.last %",
        "if $.System": "% if system %",
        "$.System": "{ system }",
        ".Content": "{ m.content }",
    }
    opened: list[str] = []

    def jinja(match: re.Match[str]) -> str:
        go = match[1]
        if go == "end":
            return f"{{% end{opened.pop()} %}}"
        if go.startswith(("if", "range")):
            opened.append("for" if go.startswith("range") else "if")
        return f"{{{words[go]}}}"

    program = re.sub(r"\{\{ (.*?) \}\}", jinja, template)
    return jinja2.Environment(keep_trailing_newline=True).from_string(program).render(messages=messages, system=system)
