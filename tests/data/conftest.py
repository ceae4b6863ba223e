"""Two tiny tokenizers made here: byte-level BPE, and pieces with a mark for spaces as SentencePiece has them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.data.templates import Family

# A busy machine makes no test wrong.
settings.register_profile("without_deadline", deadline=None)
settings.load_profile("without_deadline")

SPECIAL_TOKENS = (
    "<unk>",
    "<s>",
    "</s>",
    "<bos>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|end|>",
    "<think>",
    "</think>",
)
CORPUS = (
    "Where is my order? It is on its way to you, and it will arrive tomorrow. Thank you for your patience!",
    "How do I return a lamp? Put it back into its box and send it to our shop in Bern within 30 days.",
    "user assistant system model Answer: yes\n\nAnswer: no\n\nUser: hello\nAssistant: Hello there\n",
    "You are a helpful assistant of the shop. The shop opens at nine, and closes at six.\n",
    "\n\n",
)


def make_byte_level(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2 and Llama 3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _wrap(tokenizer, adds_bos=adds_bos)


def make_metaspace(*, adds_bos: bool = False, prepend_scheme: str = "first") -> PreTrainedTokenizerFast:
    """BPE over text whose spaces are marked, with bytes for what it does not know, as Llama 2 has it."""
    alphabet = sorted({character for text in CORPUS for character in text if character not in " \n"})
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = sorted({word for text in CORPUS for word in text.split()})
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *bytes_, "\u2581", *alphabet])}
    merges: list[tuple[str, str]] = []
    for word in words:
        left = "\u2581"
        for character in word:
            if left + character not in vocabulary:
                vocabulary[left + character] = len(vocabulary)
                merges.append((left, character))
            left += character
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", left=1),
        ]
    )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return _wrap(tokenizer, adds_bos=adds_bos)


def with_family(tokenizer: PreTrainedTokenizerFast, family: Family) -> PreTrainedTokenizerFast:
    """Give a tokenizer a family's template and special tokens."""
    tokenizer.chat_template = family.template
    tokenizer.bos_token = family.bos_token
    tokenizer.eos_token = family.eos_token
    tokenizer.pad_token = family.eos_token
    return tokenizer


TOKENIZERS: dict[str, Callable[..., PreTrainedTokenizerFast]] = {
    "byte_level": make_byte_level,
    "metaspace": make_metaspace,
}


@pytest.fixture(params=sorted(TOKENIZERS))
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Each kind of tokenizer, with an end token and no chat template."""
    return TOKENIZERS[request.param]()


@pytest.fixture
def byte_level() -> PreTrainedTokenizerFast:
    """The byte-level tokenizer, with an end token and no chat template."""
    return make_byte_level()


def _wrap(tokenizer: Tokenizer, *, adds_bos: bool) -> PreTrainedTokenizerFast:
    if adds_bos:
        bos_id = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bos_id)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
