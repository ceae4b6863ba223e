"""From a text with learned characters to tokens with a mask, the tokens being those seen at inference.

The whole text is tokenised once. An answer starts at a token boundary if the tokens before it are exactly the tokens of
the prompt alone; this is checked for every answer, because two things go wrong without a sign: a token may straddle the
boundary ("Answer: " and "yes" become "Answer:" and " yes"), and a tokenizer may split the end of the prompt differently
when something follows (two line breaks are one token at the end of a text and two before a word). Such a text is
tokenised in pieces instead, cut where each answer starts and ends, which is how the model reads and writes it.

The check costs little: tokens that the tokenizer keeps whole (`<|im_start|>`) split the text before anything else
happens, so only what stands after the last of them has to be tokenised again, and that is nearly always the same few
characters.
"""

from __future__ import annotations

import bisect
import functools
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from halfbyte.data.masks import MaskedText
from halfbyte.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Text put before a piece so that tokenizers which add a space at the start of a text add it there and not to the piece.
_ANCHORS = (":", "a", "\n")
_END = operator.itemgetter(1)
_CACHED_PROMPT_ENDS = 4096
# The tokenizer takes some 700 bytes a token while it is at work, so what it is given at once is bounded.
_CHARACTERS_AT_ONCE = 1 << 21


class EncodedText(NamedTuple):
    """Tokens, which of them are learned, and whether the text had to be tokenised in pieces."""

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    in_pieces: bool


class Encoder:
    """Tokenises masked texts in batches.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._whole_ids = frozenset(
            token_id
            for token_id, token in tokenizer.added_tokens_decoder.items()
            if not (token.normalized or token.lstrip or token.rstrip or token.single_word)
        )
        self._first_ids = _leading_ids(tokenizer)
        self._prompt_end_ids = functools.lru_cache(maxsize=_CACHED_PROMPT_ENDS)(self._ids)

    def encode(self, texts: Sequence[MaskedText]) -> list[EncodedText]:
        """Tokenise a batch of texts.

        Raises:
            DataError: An answer cannot be split from its prompt by this tokenizer.
        """
        if not self.tokenizer.is_fast:
            return [self._framed(text, self._encode_pieces(text)) for text in texts]
        return [encoded for group in _group(texts) for encoded in self._encode_at_once(group)]

    def encode_prompt(self, text: str, *, has_frame: bool) -> list[int]:
        """Return the tokens that the model is given to go on from."""
        ids = self._ids(text)
        return [*self._missing_first_ids(ids), *ids] if has_frame else list(ids)

    def _encode_at_once(self, texts: Sequence[MaskedText]) -> list[EncodedText]:
        batch = self.tokenizer(
            [text.text for text in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [
            self._framed(text, self._encode_whole(text, ids, offsets))
            for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
        ]

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _encode_whole(self, text: MaskedText, ids: list[int], offsets: list[tuple[int, int]]) -> EncodedText:
        input_ids = np.array(ids, dtype=np.int32)
        loss_mask = np.zeros(len(input_ids), dtype=np.bool_)
        for start, end in text.ranges:
            # A token of white space may have an empty extent at its end, so the end decides where a token belongs.
            first = bisect.bisect_right(offsets, start, key=_END)
            last = bisect.bisect_right(offsets, end, key=_END)
            if last < len(offsets) and offsets[last][0] < end:
                last += 1
            if not self._is_boundary(text.text, start, ids[:first], offsets):
                return self._encode_pieces(text)
            loss_mask[first:last] = True
        return EncodedText(input_ids, loss_mask, in_pieces=False)

    def _is_boundary(self, text: str, position: int, ids_before: list[int], offsets: list[tuple[int, int]]) -> bool:
        """Tell whether these tokens are those of the text before the position alone."""
        last = len(ids_before) - 1
        index = next((at for at in range(last, -1, -1) if ids_before[at] in self._whole_ids), 0)
        begin = offsets[index][0] if index else 0
        return tuple(ids_before[index:]) == self._prompt_end_ids(text[begin:position])

    def _encode_pieces(self, text: MaskedText) -> EncodedText:
        ids: list[int] = []
        mask: list[bool] = []
        position = 0
        for start, end in text.ranges:
            for piece, is_learned in ((text.text[position:start], False), (text.text[start:end], True)):
                piece_ids = self._continuation_ids(piece) if ids else self._ids(piece)
                ids += piece_ids
                mask += [is_learned] * len(piece_ids)
            position = end
        rest = text.text[position:]
        piece_ids = self._continuation_ids(rest) if ids else self._ids(rest)
        return EncodedText(
            np.array([*ids, *piece_ids], dtype=np.int32),
            np.array([*mask, *[False] * len(piece_ids)], dtype=np.bool_),
            in_pieces=len(text.ranges) > 0 and text.ranges != ((0, len(text.text)),),
        )

    def _continuation_ids(self, piece: str) -> tuple[int, ...]:
        """Return the tokens of a piece of text that does not stand at the start of one."""
        if not piece:
            return ()
        for anchor in _ANCHORS:
            anchor_ids, ids = self._ids(anchor), self._ids(anchor + piece)
            is_split = ids[: len(anchor_ids)] == anchor_ids
            if is_split and (len(ids) > len(anchor_ids) or not piece.strip()):
                return ids[len(anchor_ids) :]
        raise DataError(
            f"the tokenizer cannot split {piece[:40]!r} from the text before it. Start the answer with a word, or end "
            "the prompt with a line break."
        )

    def _framed(self, text: MaskedText, encoded: EncodedText) -> EncodedText:
        """Add the first token and the end token of a text that no template wrote, each unless it is there."""
        if not text.has_frame:
            return encoded
        eos_token_id = self.tokenizer.eos_token_id
        ids = encoded.input_ids.tolist()
        first = self._missing_first_ids(ids)
        last = [eos_token_id] if eos_token_id is not None and ids[-1:] != [eos_token_id] else []
        is_learned_from_start = bool(text.ranges) and text.ranges[0][0] == 0
        return EncodedText(
            np.array([*first, *ids, *last], dtype=np.int32),
            np.array([*[is_learned_from_start] * len(first), *encoded.loss_mask, *[True] * len(last)], dtype=np.bool_),
            encoded.in_pieces,
        )

    def _missing_first_ids(self, ids: Sequence[int]) -> tuple[int, ...]:
        return () if tuple(ids[: len(self._first_ids)]) == self._first_ids else self._first_ids


def _group(texts: Sequence[MaskedText]) -> Iterator[list[MaskedText]]:
    """Yield the texts in groups of so many characters, or of one that has more."""
    group: list[MaskedText] = []
    num_characters = 0
    for text in texts:
        if group and num_characters + len(text.text) > _CHARACTERS_AT_ONCE:
            yield group
            group, num_characters = [], 0
        group.append(text)
        num_characters += len(text.text)
    if group:
        yield group


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that the tokenizer itself puts in front of a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return tuple(full[: _find(full, bare)])


def _find(ids: list[int], wanted: list[int]) -> int:
    positions: Iterable[int] = range(len(ids) - len(wanted) + 1)
    return next((at for at in positions if ids[at : at + len(wanted)] == wanted), 0)
