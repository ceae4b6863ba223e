"""The real llama.cpp, through xllamacpp's server, as an oracle; and tiny models with tokenizers that it takes."""

from __future__ import annotations

import contextlib
import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from halfbyte.export.gguf_vocabulary import _LLAMA3, _QWEN2, _TEKKEN
from tests.models.tiny import build_tiny

VOCABULARY = 384
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "The shop opens at 9 and closes at 17:30; it's 2024, isn't it? We'll see 12345 things there, here and anywhere.",
    "A parcel that weighs 1200 grams costs less than one that weighs 12000 grams.\n\nThe parcel is in the shop.",
    "HTTPServer and JSONParser read camelCase; they're other words than those in the other text.   Spaces.",
]
SAMPLES = [
    *TEXT,
    "W\u00f6rter, \u65e5\u672c\u8a9e und emoji \U0001f600 - it's IT'S they'll   \n\n\t tabs and 1234567890 digits",
    "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n",
    "x",
]
BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
SPLITS = {
    "gpt-2": GPT2,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2]),
    **{
        name: pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), BYTE_LEVEL])
        for name, rule in {"llama-bpe": _LLAMA3, "smaug-bpe": _LLAMA3, "qwen2": _QWEN2, "tekken": _TEKKEN}.items()
    },
}


class LlamaCpp:
    """A model loaded by llama.cpp."""

    def __init__(self, address: str) -> None:
        self._address = address

    def tokenize(self, text: str) -> list[int]:
        """Return the tokens of a text, with the begin token where the model wants one."""
        return self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]

    def generate(self, prompt: list[int], num_tokens: int = 8) -> list[int]:
        """Return the tokens that follow, each the most likely one."""
        options = {"temperature": 0, "return_tokens": True, "cache_prompt": False, "ignore_eos": True}
        return self.post("/completion", prompt=prompt, n_predict=num_tokens, **options)["tokens"]

    def log_probabilities(self, prompt: list[int]) -> torch.Tensor:
        """Return the logarithms of the probabilities of every token to follow.

        llama.cpp tells none where it stops or where a letter is not whole yet, so it is made to choose a letter. What
        it tells are the model's own probabilities all the same.
        """
        letter = self.post("/tokenize", content="A", add_special=False)["tokens"][0]
        options = {"logit_bias": [[letter, 100.0]], "n_probs": VOCABULARY, "cache_prompt": False, "temperature": 0}
        first = self.post("/completion", prompt=prompt, n_predict=1, **options)["completion_probabilities"][0]
        assert first["id"] == letter
        found = torch.full((VOCABULARY,), float("nan"))
        for entry in first["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def render(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as llama.cpp writes it, by the template in the file."""
        return self.post("/apply-template", messages=messages)["prompt"]

    def post(self, path: str, **body: Any) -> Any:
        """Return what the server answers."""
        request = urllib.request.Request(
            self._address + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


@contextlib.contextmanager
def llama_cpp(path: Path, *, adapter: Path | None = None) -> Iterator[LlamaCpp]:
    """Load a GGUF file, and an adapter on top, in fp32 where llama.cpp leaves a choice."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.n_threads_http, params.verbosity = 128, 1, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    if adapter is not None:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    yield LlamaCpp(server.listening_address)
    del server


def save_speaking_tiny(
    folder: Path, family: str = "llama", *, split: str = "gpt-2", dtype: torch.dtype = torch.bfloat16, **changes: Any
) -> Path:
    """Write a tiny random model with a byte-level tokenizer, and return its folder."""
    build_tiny(family, dtype=dtype, vocab_size=VOCABULARY, **changes).save_pretrained(folder)
    build_byte_level(split).save_pretrained(folder)
    return folder


def build_byte_level(split: str = "gpt-2", *, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer that splits words as those do that llama.cpp knows by this name."""
    backend = Tokenizer(models.BPE(ignore_merges=split == "llama-bpe"))
    backend.pre_tokenizer = SPLITS[split]
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 8, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    backend.add_tokens([AddedToken("<tool>", normalized=False)])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(backend)


def build_sentencepiece() -> PreTrainedTokenizerFast:
    """Return a tokenizer as those of Llama 2 and Mistral 7B: spaces as a letter, bytes for what is unknown."""
    backend = Tokenizer(models.BPE())
    spaced = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.normalizer = spaced
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=110, show_progress=False))
    trained = json.loads(backend.to_str())["model"]
    tokens = [*SPECIAL[:3], "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *trained["vocab"]]
    merges = [tuple(pair) for pair in trained["merges"]]
    vocabulary = {token: row for row, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = spaced
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(backend, unk_token="<unk>")


def _wrap(backend: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", chat_template=CHATML, **names
    )
    assert len(tokenizer) <= VOCABULARY
    return tokenizer
