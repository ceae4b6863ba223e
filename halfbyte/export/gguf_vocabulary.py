r"""The fields of a GGUF file that describe the tokenizer.

llama.cpp has tokenizers of its own, and a file says which it needs. Two of them suit the models that we write:

    gpt2    byte-level BPE: tokens in GPT-2's spelling of bytes, merges, and by which rules words are split first
    llama   SentencePiece's BPE: tokens with the score by which they are preferred, bytes as <0x0A>

Rules of splitting are programs in llama.cpp, known by a name. Its converter finds the name by hashing how a text is
tokenised, so that one new token makes a tokenizer unknown; we read the rules themselves in tokenizer.json. A tokenizer
with other rules is refused: read with wrong ones a model loads, and answers worse.

SentencePiece's scores are not in tokenizer.json, but its merges are, in the order of the scores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from halfbyte.errors import ConfigError
from halfbyte.export.gguf_file import FieldValue, gguf_package

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2, _DIGITS = "gpt2", "digits"
# llama.cpp's name by the steps of splitting, and by whether words of the vocabulary are taken whole (ignore_merges).
_PRE_TOKENIZERS = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_QWEN2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_TEKKEN,), False): "tekken",
}
_SPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


def make_vocabulary_fields(
    tokenizer: PreTrainedTokenizerBase,
    *,
    vocab_size: int,
    end_of_turn: str | None = None,
    pre_tokenizer: str | None = None,
) -> dict[str, FieldValue]:
    """Return the fields that describe a tokenizer.

    Args:
        tokenizer: The model's.
        vocab_size: Rows of the model's embedding; those without a token get a name.
        end_of_turn: The token that ends an answer, where it may be another than the end token.
        pre_tokenizer: llama.cpp's name for the rules by which words are split; None to recognise them.

    Raises:
        ConfigError: llama.cpp has no tokenizer that does the same, or there are more tokens than rows.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("the tokenizer has no tokenizer.json; save it with a fast tokenizer of transformers first")
    state = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] != "BPE" or not model["merges"]:
        raise ConfigError(f"the tokenizer is {model['type']}; a GGUF file takes byte-pair encoding with merges")
    steps = list(_steps(state["pre_tokenizer"]))
    if any(step["type"] == "ByteLevel" for step in steps):
        pre_tokenizer = pre_tokenizer or _recognise(state, steps)
        fields: dict[str, FieldValue] = {"model": "gpt2", "pre": pre_tokenizer, "merges": _merges(model)}
    elif model["byte_fallback"]:
        fields = {"model": "llama", "pre": "default", "add_space_prefix": _has_space_prefix(state, steps)}
    else:
        raise ConfigError("the tokenizer is neither byte-level nor falls back to bytes; llama.cpp has none like it")
    tokens, types = _tokens(state, vocab_size)
    fields |= {"tokens": tokens, "token_type": types}
    if fields["model"] == "llama":
        fields["scores"] = _scores(model, tokens)
    fields |= _special_fields(tokenizer, end_of_turn)
    named = {f"tokenizer.ggml.{name}": value for name, value in fields.items()}
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return named | ({"tokenizer.chat_template": template} if template else {})


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a text's tokens begin with the begin token."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def _steps(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a normalizer or pre-tokenizer, which may be sequences in sequences."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for inner in component.get("pretokenizers") or component.get("normalizers") or ():
        yield from _steps(inner)


def _recognise(state: dict[str, Any], steps: list[dict[str, Any]]) -> str:
    normalizers = {step["type"] for step in _steps(state["normalizer"])}
    # llama.cpp does without NFC: of texts in NFC, as nearly all are, it makes the same tokens.
    rules = tuple(filter(None, map(_rule, steps)))
    name = _PRE_TOKENIZERS.get((rules, bool(state["model"].get("ignore_merges"))))
    if name is None or not normalizers <= {"NFC"}:
        raise ConfigError(
            "the tokenizer prepares and splits words by rules whose name in llama.cpp is not known: "
            f"{sorted(normalizers)}, {[step['type'] for step in steps]}. If llama.cpp has them, name them with "
            "--pre-tokenizer"
        )
    return name


def _rule(step: dict[str, Any]) -> str | None:
    """Return what identifies a step; None where it does not split."""
    if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
        return _GPT2 if step.get("use_regex", True) else None
    if step["type"] == "Digits" and step.get("individual_digits"):
        return _DIGITS
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", "a plain string")
    return f"unknown {step['type']}"


def _merges(model: dict[str, Any]) -> list[str]:
    return [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def _has_space_prefix(state: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    known = {"Prepend", "Replace", "Metaspace"}
    every_step = [*_steps(state["normalizer"]), *steps]
    unknown = sorted({step["type"] for step in every_step} - known)
    if unknown:
        raise ConfigError(f"the tokenizer prepares text by {', '.join(unknown)}, which llama.cpp does not do for it")
    return any(
        step["type"] == "Prepend" or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
        for step in every_step
    )


def _tokens(state: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    """Return text and type of every row of the embedding."""
    types = gguf_package().TokenType
    tokens = [f"[PAD{row}]" for row in range(vocab_size)]
    kinds = [int(types.UNUSED)] * vocab_size
    known = [(token, row, types.NORMAL) for token, row in state["model"]["vocab"].items()]
    added = [
        (token["content"], token["id"], types.CONTROL if token["special"] else types.USER_DEFINED)
        for token in state["added_tokens"]
    ]
    for token, row, kind in (*known, *added):
        if row >= vocab_size:
            raise ConfigError(f"the tokenizer has a token {token!r} of number {row}, the model {vocab_size} tokens")
        if state["model"]["byte_fallback"] and _BYTE_TOKEN.fullmatch(token):
            kind = types.BYTE
        elif token == state["model"]["unk_token"]:
            kind = types.UNKNOWN
        tokens[row], kinds[row] = token, int(kind)
    return tokens, kinds


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """Return how much each token is preferred: the earlier its first merge, the more."""
    first: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        pair = merge.split(" ") if isinstance(merge, str) else merge
        first.setdefault("".join(pair), rank)
    return [-float(first.get(token, len(model["merges"]))) for token in tokens]


def _special_fields(tokenizer: PreTrainedTokenizerBase, end_of_turn: str | None) -> dict[str, FieldValue]:
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "unknown_token_id": tokenizer.unk_token_id,
        "padding_token_id": tokenizer.pad_token_id,
    }
    if end_of_turn and end_of_turn in tokenizer.get_vocab():
        ids["eot_token_id"] = tokenizer.convert_tokens_to_ids(end_of_turn)
    fields: dict[str, FieldValue] = {name: token_id for name, token_id in ids.items() if token_id is not None}
    ends_with_eos = tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return fields | {"add_bos_token": adds_bos(tokenizer), "add_eos_token": ends_with_eos}
