"""Tokens of a masked text are those that the model sees when it is used, whatever the tokenizer does at the seams."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from halfbyte.data import encode
from halfbyte.data.encode import Encoder
from halfbyte.data.masks import MaskedText
from halfbyte.errors import DataError
from tests.data.conftest import make_byte_level, make_metaspace

ENCODERS = {
    "byte_level": Encoder(make_byte_level()),
    "metaspace": Encoder(make_metaspace()),
    "metaspace_always": Encoder(make_metaspace(prepend_scheme="always")),
}
pieces = st.lists(
    st.sampled_from(
        ["order", " order", "\n", "\n\n", " ", "  ", "no", "?", "\u00e9", "\U0001f600", "</s>", "<|im_start|>", "x"]
    ),
    max_size=5,
).map("".join)


def ids_of(encoder: Encoder, text: str) -> list[int]:
    """Tokenise a text alone."""
    return encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", sorted(ENCODERS))
@given(prompt=pieces, answer=pieces.filter(bool), rest=pieces)
@settings(max_examples=100)
def test_encode_starts_an_answer_after_the_tokens_of_its_prompt(name: str, prompt: str, answer: str, rest: str) -> None:
    encoder = ENCODERS[name]
    text = MaskedText(prompt + answer + rest, ((len(prompt), len(prompt) + len(answer)),))
    (encoded,) = encoder.encode([text])
    expected = ids_of(encoder, prompt)
    assert encoded.input_ids[: len(expected)].tolist() == expected
    assert not encoded.loss_mask[: len(expected)].any()
    assert encoded.loss_mask[len(expected)]
    if name == "byte_level":
        assert encoder.tokenizer.decode(encoded.input_ids) == prompt + answer + rest
    if not encoded.in_pieces:
        assert encoded.input_ids.tolist() == ids_of(encoder, prompt + answer + rest)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encode_cuts_a_token_that_straddles_the_seam(name: str) -> None:
    encoder = ENCODERS[name]
    prompt, answer = "Answer: ", "order"
    assert ids_of(encoder, prompt + answer)[: len(ids_of(encoder, prompt))] != ids_of(encoder, prompt)
    (encoded,) = encoder.encode([MaskedText(prompt + answer, ((len(prompt), len(prompt + answer)),))])
    assert encoded.in_pieces
    learned = encoded.input_ids[encoded.loss_mask].tolist()
    assert "".join(encoder.tokenizer.convert_ids_to_tokens(learned)) == "order"


def test_encode_cuts_line_breaks_that_are_one_token_only_at_the_end() -> None:
    encoder = ENCODERS["byte_level"]
    prompt, answer = "Answer:\n\n", "no"
    assert len(ids_of(encoder, "\n\n")) == 1
    assert ids_of(encoder, prompt + answer)[: len(ids_of(encoder, prompt))] != ids_of(encoder, prompt)
    (encoded,) = encoder.encode([MaskedText(prompt + answer, ((len(prompt), len(prompt + answer)),))])
    assert encoded.input_ids.tolist() == ids_of(encoder, prompt) + ids_of(encoder, answer)


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_encode_learns_every_byte_of_a_character_at_the_end(name: str) -> None:
    encoder = ENCODERS[name]
    (encoded,) = encoder.encode([MaskedText("no\U0001f600\U0001f600 x", ((2, 3),))])
    learned = encoder.tokenizer.decode(encoded.input_ids[encoded.loss_mask].tolist())
    assert learned.strip() == "\U0001f600"
    assert encoded.loss_mask.sum() == 4


@pytest.mark.parametrize("adds_bos", [False, True])
def test_encode_frames_plain_text_once(adds_bos: bool) -> None:
    for make in (make_byte_level, make_metaspace):
        tokenizer = make(adds_bos=adds_bos)
        encoder = Encoder(tokenizer)
        bos = [tokenizer.bos_token_id] if adds_bos else []
        for text in ("order no", "<s>order no", "order no</s>"):
            if text.startswith("<s>") and not adds_bos:
                continue
            (encoded,) = encoder.encode([MaskedText(text, ((0, len(text)),), has_frame=True)])
            words = ids_of(encoder, text)
            words = words[1:] if text.startswith("<s>") else words
            words = words[:-1] if text.endswith("</s>") else words
            assert encoded.input_ids.tolist() == [*bos, *words, tokenizer.eos_token_id]
            assert encoded.loss_mask.all()


def test_encode_adds_no_second_first_token_to_a_rendered_text() -> None:
    encoder = Encoder(make_byte_level(adds_bos=True))
    (encoded,) = encoder.encode([MaskedText("<s>order", ((3, 8),))])
    assert encoded.input_ids.tolist() == ids_of(encoder, "<s>order")


def test_encode_prompt_is_what_the_tokenizer_gives() -> None:
    tokenizer = make_byte_level(adds_bos=True)
    encoder = Encoder(tokenizer)
    assert encoder.encode_prompt("Where is", has_frame=True) == tokenizer("Where is")["input_ids"]
    assert encoder.encode_prompt("<s>Where is", has_frame=False) == tokenizer("Where is")["input_ids"]


def test_encode_works_without_offsets(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "<|im_start|>user\nno<|im_end|>\n<|im_start|>assistant\norder<|im_end|>"
    start = text.index("order")
    masked = MaskedText(text, ((start, len(text)),))
    with_offsets = ENCODERS["byte_level"].encode([masked])[0]
    tokenizer = make_byte_level()
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    without = Encoder(tokenizer).encode([masked])[0]
    assert without.input_ids.tolist() == with_offsets.input_ids.tolist()
    assert without.loss_mask.tolist() == with_offsets.loss_mask.tolist()


def test_encode_explains_a_seam_that_cannot_be_cut() -> None:
    # The whole text is one token: nothing can be split off.
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "yes": 1}, unk_token="[UNK]"))
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]"))
    with pytest.raises(DataError, match="cannot split 'yes' from the text before it"):
        encoder.encode([MaskedText("Answer:yes", ((7, 10),))])


def test_encode_gives_the_tokenizer_so_much_at_once(
    byte_level: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [MaskedText("order " * count, ((0, 5),)) for count in (1, 2, 30, 1, 1)]
    whole = Encoder(byte_level).encode(texts)
    monkeypatch.setattr(encode, "_CHARACTERS_AT_ONCE", 20)
    assert [len(group) for group in encode._group(texts)] == [2, 1, 2]
    for one, other in zip(whole, Encoder(byte_level).encode(texts), strict=True):
        assert np.array_equal(one.input_ids, other.input_ids)
        assert np.array_equal(one.loss_mask, other.loss_mask)
    assert Encoder(byte_level).encode([]) == []
