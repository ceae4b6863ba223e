"""Tokenizers in GGUF files: llama.cpp makes the same tokens as the tokenizer they came from."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerFast

from halfbyte.errors import ConfigError
from halfbyte.export import export_gguf
from halfbyte.export.gguf_vocabulary import make_vocabulary_fields
from tests.export.llama_cpp import SAMPLES, SPLITS, VOCABULARY, build_byte_level, build_sentencepiece, llama_cpp
from tests.export.test_gguf_model import needs_llama_cpp
from tests.models.tiny import build_tiny


@needs_llama_cpp
@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("split", SPLITS)
def test_llama_cpp_splits_words_alike(split: str, adds_bos: bool, tmp_path: Path) -> None:
    assert_tokens_alike(build_byte_level(split, adds_bos=adds_bos), tmp_path)


@needs_llama_cpp
def test_llama_cpp_prefers_pieces_alike(tmp_path: Path) -> None:
    assert_tokens_alike(build_sentencepiece(), tmp_path)


@pytest.mark.parametrize("split", SPLITS)
def test_make_vocabulary_fields_names_the_rules(split: str) -> None:
    fields = make_vocabulary_fields(build_byte_level(split), vocab_size=VOCABULARY, end_of_turn="<|im_end|>")
    assert fields["tokenizer.ggml.pre"] == split
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "eot", "padding")}
    assert ids == {"bos": 1, "eos": 2, "eot": 4, "padding": 0}
    types = fields["tokenizer.ggml.token_type"]
    tokens = fields["tokenizer.ggml.tokens"]
    assert isinstance(types, list)
    assert isinstance(tokens, list)
    assert len(types) == len(tokens) == VOCABULARY
    assert (types[4], types[tokens.index("<tool>")], types[-1], tokens[-1]) == (3, 4, 5, f"[PAD{VOCABULARY - 1}]")


def test_make_vocabulary_fields_refuses_rules_it_does_not_know() -> None:
    tokenizer = build_byte_level()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(ConfigError, match=r"\['Punctuation', 'ByteLevel'\].*--pre-tokenizer"):
        make_vocabulary_fields(tokenizer, vocab_size=VOCABULARY)
    named = make_vocabulary_fields(tokenizer, vocab_size=VOCABULARY, pre_tokenizer="mine")
    assert named["tokenizer.ggml.pre"] == "mine"


def assert_tokens_alike(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    build_tiny("llama", vocab_size=VOCABULARY).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    export_gguf(folder / "model", folder / "model.gguf")
    messages = [{"role": "user", "content": "hello"}]
    with llama_cpp(folder / "model.gguf") as oracle:
        for text in SAMPLES:
            assert oracle.tokenize(text) == tokenizer(text)["input_ids"], text
        assert oracle.render(messages) == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
