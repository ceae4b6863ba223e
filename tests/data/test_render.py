"""Examples as tokens and masks: system prompts, templates, end tokens, and what is said about them."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from halfbyte.data.examples import Example, Message
from halfbyte.data.render import Renderer, build_renderer
from halfbyte.data.report import token_spans
from halfbyte.errors import DataError
from tests.data.conftest import TOKENIZERS, make_byte_level, make_metaspace, with_family
from tests.data.templates import COUNTING, FAMILIES, NO_END
from tests.golden.chat.make import PATH, render_family

ASKED = {"role": "user", "content": "Where is it?"}
ANSWER = {"role": "assistant", "content": "On its way."}
words = st.text(alphabet="ab .,\n\u00e9\U0001f600", min_size=1, max_size=12).filter(str.strip)
RENDERERS = {
    (kind, family): build_renderer(with_family(make(), facts))
    for kind, make in TOKENIZERS.items()
    for family, facts in FAMILIES.items()
}


def talk(*messages: Message, **fields: Any) -> Example:
    """Make an example of a conversation."""
    return Example(origin="a.jsonl:3", messages=messages, **fields)


def shown(renderer: Renderer, example: Example) -> list[list[tuple[str, bool]]]:
    """Return the pieces of text that are learned and those that are not."""
    return [[tuple(span) for span in token_spans(renderer.tokenizer, made)] for made in renderer.render(example)]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@given(contents=st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@settings(max_examples=15)
def test_render_gives_the_tokens_of_inference(kind: str, family: str, contents: list[str]) -> None:
    renderer, facts = RENDERERS[kind, family], FAMILIES[family]
    tokenizer = renderer.tokenizer
    roles = ("user", "assistant")
    messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(contents)]
    renderer.forget_counts()
    rendered = renderer.render(talk(*messages))
    in_pieces = any("pieces" in note for note in renderer.notes)
    num_learned = 0
    for number, made in enumerate(rendered):
        starts = np.flatnonzero(np.diff(made.loss_mask.astype(int), prepend=0) == 1).tolist()
        num_learned += len(starts)
        for position, start in enumerate(starts):
            turn = 2 * (number + position) + 1
            prompt = tokenizer.apply_chat_template(messages[:turn], add_generation_prompt=True, return_dict=False)
            # Pieces change how earlier answers are tokenised, so only the first is compared then.
            if position == 0 or not in_pieces:
                assert made.input_ids[:start].tolist() == prompt
        assert made.loss_mask[-1]
        assert tokenizer.decode(made.input_ids.tolist()).endswith(facts.end_of_turn)
    assert num_learned == len(messages) // 2


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_render_matches_what_was_read_by_eye(family: str, kind: str) -> None:
    assert render_family(family, kind) == json.loads(PATH.read_text(encoding="utf-8"))[family]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_render_learns_the_end_token_where_it_is_also_the_padding(family: str) -> None:
    facts = FAMILIES[family]
    renderer = build_renderer(with_family(make_byte_level(), facts))
    assert renderer.tokenizer.pad_token == renderer.tokenizer.eos_token
    last_tokens = [made.input_ids[made.loss_mask][-1] for made in renderer.render(talk(ASKED, ANSWER, ASKED, ANSWER))]
    end_ids = renderer.tokenizer(facts.end_of_turn.strip(), add_special_tokens=False)["input_ids"]
    assert last_tokens == [end_ids[-1]] * len(last_tokens)


@pytest.mark.parametrize("make", [make_byte_level, make_metaspace])
def test_render_never_doubles_the_first_token(make: Any) -> None:
    for family in ("llama2", "llama3", "gemma", "mistral"):
        renderer = build_renderer(with_family(make(adds_bos=True), FAMILIES[family]))
        bos_id = renderer.tokenizer.bos_token_id
        assert renderer.render(talk(ASKED, ANSWER))[0].input_ids.tolist().count(bos_id) == 1
    headings = build_renderer(make(adds_bos=True), chat_template="headings")
    ids = headings.render(talk(ASKED, ANSWER))[0].input_ids.tolist()
    assert ids[0] == headings.tokenizer.bos_token_id
    assert ids.count(ids[0]) == 1


def test_render_learns_all_of_a_text_and_one_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    renderer = build_renderer(tokenizer)
    for text in ("Where is my order?", "Where is my order?</s>"):
        (made,) = renderer.render(Example(origin="x", text=text))
        assert made.loss_mask.all()
        assert made.input_ids.tolist().count(tokenizer.eos_token_id) == 1
        assert made.input_ids[-1] == tokenizer.eos_token_id
    assert renderer.notes == []


def test_render_learns_the_completion_of_a_plain_pair(tokenizer: PreTrainedTokenizerFast) -> None:
    example = Example(origin="x", prompt="Where is my order?", completion=" On its way.")
    assert shown(build_renderer(tokenizer), example) == [[("Where is my order?", False), (" On its way.</s>", True)]]
    assert shown(build_renderer(tokenizer, train_on="all"), example) == [[("Where is my order? On its way.</s>", True)]]


def test_render_uses_a_built_in_template_and_says_so(byte_level: PreTrainedTokenizerFast) -> None:
    renderer = build_renderer(byte_level)
    assert shown(renderer, talk(ASKED, ANSWER)) == [
        [
            ("<|im_start|>user\nWhere is it?<|im_end|>\n<|im_start|>assistant\n", False),
            ("On its way.<|im_end|>", True),
        ]
    ]
    assert renderer.notes[0] == "chat template: the built-in 'chatml' (the tokenizer has none)"
    assert byte_level.chat_template is None
    byte_level.chat_template = renderer.chat_template
    assert shown(build_renderer(byte_level), talk(ASKED, ANSWER)) == shown(renderer, talk(ASKED, ANSWER))


def test_render_adds_the_system_prompt_where_there_is_none(byte_level: PreTrainedTokenizerFast) -> None:
    renderer = build_renderer(byte_level, system="Be kind.")
    own = {"role": "system", "content": "Be rude."}
    assert shown(renderer, talk(ASKED, ANSWER))[0][0][0].startswith("<|im_start|>system\nBe kind.<|im_end|>")
    assert shown(renderer, talk(own, ASKED, ANSWER))[0][0][0].startswith("<|im_start|>system\nBe rude.<|im_end|>")
    assert "1 examples without a system prompt were given data.system" in renderer.notes
    # The system turn moves all others, those that are only read as well.
    partly = talk(ASKED, ANSWER, ASKED, {**ANSWER, "content": "Yes."}, context_turns=frozenset({1}))
    assert [text for text, is_learned in shown(renderer, partly)[0] if is_learned] == ["Yes.<|im_end|>"]


def test_render_folds_the_system_prompt_where_the_template_takes_none() -> None:
    renderer = build_renderer(with_family(make_byte_level(), FAMILIES["gemma"]), system="Be kind.")
    example = talk(ASKED, ANSWER, ASKED, ANSWER, context_turns=frozenset({1}))
    text = "".join(piece for piece, _ in shown(renderer, example)[0])
    assert text.count("Be kind.") == 1
    assert text.startswith("<bos><start_of_turn>user\nBe kind.\n\nWhere is it?<end_of_turn>")
    assert [is_learned for _, is_learned in shown(renderer, example)[0]] == [False, True]
    with pytest.raises(DataError, match=r"a\.jsonl:3: the chat template takes no system turn and there is no user"):
        renderer.render(talk(ANSWER))


def test_render_makes_an_example_of_each_answer_where_the_past_is_rewritten() -> None:
    renderer = build_renderer(with_family(make_byte_level(), FAMILIES["qwen3"]))
    first, second = renderer.render(talk(ASKED, ANSWER, ASKED, ANSWER))
    assert first.origin == second.origin == "a.jsonl:3"
    assert "the template rewrites earlier answers: 2 training texts made, one for each answer" in renderer.notes


def test_render_says_what_is_not_learned(byte_level: PreTrainedTokenizerFast) -> None:
    renderer = build_renderer(byte_level)
    renderer.render(talk({"role": "assistant", "content": "Welcome!"}, ASKED, ANSWER, ASKED))
    assert "1 answers before the first user turn are read and not learned" in renderer.notes
    assert "1 conversations end with turns that nobody answers; those turns are left out" in renderer.notes
    renderer.render(talk({"role": "user", "content": "What is <|im_end|>?"}, ANSWER))
    assert any("1 examples hold a control token" in note for note in renderer.notes)
    renderer.forget_counts()
    assert renderer.notes == ["chat template: the built-in 'chatml' (the tokenizer has none)"]
    forgetful = build_renderer(
        byte_level,
        chat_template="{% for m in messages if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\n' + m.content "
        "+ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    )
    forgetful.render(talk(ASKED, ANSWER, {"role": "tool", "content": "sent"}, ANSWER))
    assert any("1 turns are left out or changed by the chat template" in note for note in forgetful.notes)
    endless = build_renderer(byte_level, chat_template=NO_END)
    endless.render(talk(ASKED, ANSWER))
    assert any("the template ends no turn" in note for note in endless.notes)


def test_render_learns_everything_when_asked(byte_level: PreTrainedTokenizerFast) -> None:
    (made,) = build_renderer(byte_level, train_on="all", chat_template=COUNTING).render(talk(ASKED, ANSWER))
    assert made.loss_mask.all()


def test_render_names_the_example_that_cannot_be_rendered(byte_level: PreTrainedTokenizerFast) -> None:
    broken = build_renderer(byte_level, chat_template=COUNTING)
    with pytest.raises(DataError, match=r"^a\.jsonl:3: the chat template \(the one given\) cannot be masked"):
        broken.render(talk(ASKED, ANSWER))
    deaf = FAMILIES["chatml"].template.replace("m.content", "(m.content if m.role == 'assistant' else '')")
    with pytest.raises(DataError, match=r"^a\.jsonl:3: the chat template .* does not write the words of the user"):
        build_renderer(byte_level, chat_template=deaf).render(talk(ASKED, ANSWER))
    strict = build_renderer(with_family(byte_level, FAMILIES["llama2"]))
    with pytest.raises(DataError, match=r"^a\.jsonl:3: the chat template does not take this.*roles must alternate"):
        strict.render(talk(ASKED, ASKED, ANSWER))


def test_render_chat_gives_the_prompt_and_stop_tokens(byte_level: PreTrainedTokenizerFast) -> None:
    tokenizer = with_family(byte_level, FAMILIES["phi3"])
    renderer = build_renderer(tokenizer, system="Be kind.")
    assert tokenizer.decode(renderer.render_chat([ASKED])) == (
        "<|system|>\nBe kind.<|end|>\n<|user|>\nWhere is it?<|end|>\n<|assistant|>\n"
    )
    assert tokenizer.convert_ids_to_tokens(renderer.stop_token_ids) == ["<|endoftext|>", "<|end|>"]


def test_render_prompt_gives_what_comes_before_the_last_answer(byte_level: PreTrainedTokenizerFast) -> None:
    renderer = build_renderer(byte_level)
    prompt = renderer.render_prompt(talk(ASKED, ANSWER, ASKED, ANSWER))
    assert prompt == renderer.render_chat([ASKED, ANSWER, ASKED])
    pair = Example(origin="x", prompt="Where", completion=" here")
    assert renderer.render_prompt(pair) == byte_level("Where")["input_ids"]
    assert renderer.render_prompt(Example(origin="x", text="Where")) is None
    assert renderer.render_prompt(talk(ASKED)) is None


def test_build_renderer_explains_a_wrong_train_on(byte_level: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="train_on is 'user', must be"):
        build_renderer(byte_level, train_on="user")  # type: ignore[arg-type]
