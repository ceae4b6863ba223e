"""The mask is right for every template, which means: what is learned is what the model will be asked to write."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from halfbyte.data.chat import ChatTemplate, find_chat_template
from halfbyte.data.examples import Message
from halfbyte.data.masks import Conversation, learned_turns, mask_answers, mask_everything
from halfbyte.errors import DataError
from tests.data.conftest import make_byte_level, with_family
from tests.data.templates import COUNTING, FAMILIES, MARKS_EVERYTHING, NO_END, OPENS_THOUGHT, PHI3

words = st.text(alphabet="ab .,\n\u00e9\U0001f600", min_size=1, max_size=12).filter(str.strip)
TALK = (
    {"role": "user", "content": "Where is it?"},
    {"role": "assistant", "content": "On its way."},
    {"role": "user", "content": "Really?"},
    {"role": "assistant", "content": "Yes."},
)
TEMPLATES = {name: find_chat_template(with_family(make_byte_level(), family)) for name, family in FAMILIES.items()}


def as_conversation(messages: tuple[Message, ...], context: frozenset[int] = frozenset()) -> Conversation:
    """Make a conversation that learns all its answers but those of the context."""
    return Conversation(messages, None, learned_turns(messages, context))


def learned_texts(template: ChatTemplate, conversation: Conversation) -> list[str]:
    """Return the texts that are learned."""
    return [masked.text[start:end] for masked in mask_answers(template, conversation) for start, end in masked.ranges]


@pytest.mark.parametrize("family", sorted(FAMILIES))
@given(contents=st.lists(words, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0))
@settings(max_examples=25)
def test_mask_answers_learns_what_follows_the_prompt(family: str, contents: list[str]) -> None:
    facts, template = FAMILIES[family], TEMPLATES[family]
    roles = ("user", "assistant")
    messages = tuple({"role": roles[n % 2], "content": text} for n, text in enumerate(contents))
    conversation = as_conversation(messages)
    masked = mask_answers(template, conversation)
    found = [(item.text[:start], item.text[start:end]) for item in masked for start, end in item.ranges]
    assert len(found) == len(conversation.learned)
    assert len(masked) == (len(conversation.learned) if facts.rewrites_past else 1)
    for turn, (before, learned) in zip(conversation.learned, found, strict=True):
        prompt = template.render(messages[:turn], add_generation_prompt=True)
        finished = template.render(messages[: turn + 1])
        assert before == prompt
        assert finished == prompt + learned + facts.closing
        assert learned.endswith(facts.end_of_turn)
        answer = contents[turn].strip() if facts.strips else contents[turn]
        if family == "qwen3":
            # Its template takes line breaks from the front of an answer alone.
            answer = answer.lstrip("\n")
        assert learned.removesuffix(facts.end_of_turn).endswith(answer)
    assert all(item.text.endswith(facts.end_of_turn) for item in masked)


def test_mask_answers_splits_only_where_the_past_is_rewritten() -> None:
    system = ({"role": "system", "content": "Be kind."}, *TALK)
    for family, template in TEMPLATES.items():
        num_texts = len(mask_answers(template, as_conversation(system if FAMILIES[family].takes_system else TALK)))
        assert num_texts == (2 if family in ("qwen3", "mistral") else 1), family


def test_mask_answers_keeps_the_reasoning_of_the_answer_that_is_learned() -> None:
    talk = tuple(
        {**m, "content": f"<think>\nhm {n}\n</think>\n\n{m['content']}"} if m["role"] == "assistant" else m
        for n, m in enumerate(TALK)
    )
    first, second = mask_answers(TEMPLATES["qwen3"], as_conversation(talk))
    assert first.text.endswith("<think>\nhm 1\n</think>\n\nOn its way.<|im_end|>")
    assert "hm 1" not in second.text
    assert second.text[slice(*second.ranges[0])] == "<think>\nhm 3\n</think>\n\nYes.<|im_end|>"


def test_mask_answers_leaves_context_and_greetings_unlearned() -> None:
    greeting = {"role": "assistant", "content": "Welcome!"}
    for family in ("chatml", "marked", "qwen3"):
        template = TEMPLATES[family]
        texts = learned_texts(template, as_conversation((greeting, *TALK), frozenset({2})))
        assert [text.removeprefix("<think>\n\n</think>\n\n") for text in texts] == ["Yes.<|im_end|>"]


def test_mask_answers_leaves_out_what_nobody_answers() -> None:
    asked_again = (*TALK, {"role": "user", "content": "When?"})
    assert mask_answers(TEMPLATES["chatml"], as_conversation(asked_again)) == mask_answers(
        TEMPLATES["chatml"], as_conversation(TALK)
    )


def test_mask_answers_learns_nothing_where_nothing_is_answered() -> None:
    (masked,) = mask_answers(TEMPLATES["chatml"], as_conversation(TALK[:1]))
    assert masked.ranges == ()


def test_mask_answers_learns_tool_calls_and_not_their_results() -> None:
    template = ChatTemplate(
        make_byte_level(),
        text=(
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
            "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
        origin="x",
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find"}}]}
    talk = (TALK[0], call, {"role": "tool", "content": "sent"}, TALK[1])
    assert learned_texts(template, as_conversation(talk)) == ['{"name": "find"}<|im_end|>', "On its way.<|im_end|>"]


def test_mask_answers_uses_prefixes_where_markers_are_wrong() -> None:
    tokenizer = make_byte_level()
    everything = ChatTemplate(tokenizer, text=MARKS_EVERYTHING, origin="x")
    # The markers leave the answers out and hold only their ends.
    ends_only = FAMILIES["marked"].template.replace(
        "{% generation %}{{ m.content }}", "{{ m.content }}{% generation %}"
    )
    for template in (everything, ChatTemplate(tokenizer, text=ends_only, origin="x")):
        (masked,) = mask_answers(template, as_conversation(TALK))
        assert masked.way == "prefixes"
        assert learned_texts(template, as_conversation(TALK)) == ["On its way.<|im_end|>", "Yes.<|im_end|>"]
    assert mask_answers(TEMPLATES["marked"], as_conversation(TALK))[0].way == "markers"


def test_mask_answers_does_not_learn_the_header_inside_markers() -> None:
    text = FAMILIES["marked"].template.replace(
        "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}",
        "{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '\n' }}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ '<|im_start|>assistant\n' }}",
    )
    template = ChatTemplate(make_byte_level(), text=text, origin="x")
    (masked,) = mask_answers(template, as_conversation(TALK))
    assert masked.way == "markers"
    assert learned_texts(template, as_conversation(TALK)) == ["On its way.<|im_end|>", "Yes.<|im_end|>"]


def test_mask_answers_trusts_markers_that_it_cannot_prove_and_says_so() -> None:
    text = FAMILIES["marked"].template.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
    (masked,) = mask_answers(ChatTemplate(make_byte_level(), text=text, origin="x"), as_conversation(TALK))
    assert masked.way == "unproved markers"
    assert [masked.text[slice(*found)] for found in masked.ranges] == ["On its way.<|im_end|>", "Yes.<|im_end|>"]


def test_mask_answers_uses_prefixes_where_ranges_cannot_be_told_apart() -> None:
    two_ranges = FAMILIES["marked"].template.replace(
        "{% generation %}", "{% generation %}{{ '<think></think>' }}{% endgeneration %}{% generation %}"
    )
    template = ChatTemplate(make_byte_level(), text=two_ranges, origin="x")
    (masked,) = mask_answers(template, as_conversation(TALK, frozenset({1})))
    assert masked.way == "prefixes"
    assert [masked.text[slice(*found)] for found in masked.ranges] == ["<think></think>Yes.<|im_end|>"]
    assert mask_answers(template, as_conversation(TALK))[0].way == "markers"


@pytest.mark.parametrize("words", ["m.content | upper", "(m.content | list)[:0] | join"])
def test_mask_answers_refuses_a_template_that_does_not_write_the_answer(words: str) -> None:
    text = FAMILIES["chatml"].template.replace("m.content", words)
    with pytest.raises(DataError, match=r"does not write the words of turn 2; it has '.*<\|im_end\|>' there"):
        mask_answers(ChatTemplate(make_byte_level(), text=text, origin="x"), as_conversation(TALK))


def test_mask_answers_adds_an_end_where_the_template_has_none(byte_level: PreTrainedTokenizerFast) -> None:
    template = ChatTemplate(byte_level, text=NO_END, origin="x")
    assert learned_texts(template, as_conversation(TALK)) == [" On its way.", " Yes.</s>"]


def test_mask_answers_does_not_learn_the_closing() -> None:
    assert learned_texts(TEMPLATES["phi3"], as_conversation(TALK)) == ["On its way.<|end|>", "Yes.<|end|>"]
    assert "else %}{{ eos_token }}" in PHI3


@pytest.mark.parametrize("text", [COUNTING, OPENS_THOUGHT])
def test_mask_answers_refuses_a_template_that_cannot_be_masked(byte_level: PreTrainedTokenizerFast, text: str) -> None:
    template = ChatTemplate(byte_level, text=text, origin="the one given")
    with pytest.raises(
        DataError,
        match=r"the chat template \(the one given\) cannot be masked: when turn 2 is asked for it writes '.*' where "
        r"the finished conversation has '.*--data\.chat_template.*--data\.train_on=all",
    ):
        mask_answers(template, as_conversation(TALK))
    assert mask_everything(template, as_conversation(TALK)).ranges[0][0] == 0


def test_mask_everything_learns_the_whole_text() -> None:
    for template in TEMPLATES.values():
        masked = mask_everything(template, as_conversation(TALK))
        assert masked.ranges == ((0, len(masked.text)),)
        assert masked.text == template.render(TALK)
