"""The records that travel through this layer: rows read, examples, tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Message = dict[str, Any]
"""One turn as chat templates take it: role, content, and whatever else the row gave (tool_calls, reasoning_content)."""


class Row(NamedTuple):
    """One record of a file, before anything is known about its layout."""

    origin: str
    """Where it came from, as "file:line"."""
    fields: dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Example:
    """One thing to learn: a conversation, a text, or a prompt with its completion taken literally.

    Exactly one of `messages`, `text` and `completion` is set.
    """

    origin: str
    messages: tuple[Message, ...] | None = None
    text: str | None = None
    prompt: str = ""
    completion: str | None = None
    tools: tuple[Any, ...] | None = None
    """JSON schemas of the functions that the assistant may call, for the chat template."""
    context_turns: frozenset[int] = frozenset()
    """Assistant turns that are read and not learned, by their index in `messages`."""
    is_document: bool = False
    """A text file as a whole: longer than the context, it goes on in further examples instead of being cut."""

    def identity(self) -> bytes:
        """Return what makes two examples the same one, wherever they stand: 16 bytes of a hash of what they hold."""
        content = [self.messages, self.text, self.prompt, self.completion, self.tools]
        text = json.dumps(content, sort_keys=True, ensure_ascii=True, default=str)
        # Among a million examples two that differ have one hash with a chance of 1 in 10^26.
        return hashlib.blake2b(text.encode("ascii"), digest_size=16).digest()


class Dropped(NamedTuple):
    """A row or example that is left out, and why."""

    origin: str
    reason: str


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class TokenizedExample:
    """What the model sees of one example.

    Args:
        input_ids: Tokens, (num_tokens,); held as int32, 5 bytes a token with its mask where lists take 40.
        loss_mask: Which tokens are learned, (num_tokens,), bool.
        origin: Where the example came from.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    origin: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_ids", np.asarray(self.input_ids, dtype=np.int32))
        object.__setattr__(self, "loss_mask", np.asarray(self.loss_mask, dtype=np.bool_))
        assert self.input_ids.shape == self.loss_mask.shape, "a mask value for each token"
        assert self.input_ids.ndim == 1, "one example"

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_trained_tokens(self) -> int:
        """Number of tokens that are a target; the first token has nothing before it to be predicted from."""
        return int(self.loss_mask[1:].sum())

    def labels(self, *, ignore_index: int = -100) -> npt.NDArray[np.int64]:
        """Return the target of each position: the next token where that one is learned, else `ignore_index`."""
        labels = np.full(len(self), ignore_index, dtype=np.int64)
        labels[:-1] = np.where(self.loss_mask[1:], self.input_ids[1:], ignore_index)
        return labels

    def window(self, start: int, stop: int) -> TokenizedExample:
        """Return tokens start to stop as an example of its own."""
        return TokenizedExample(self.input_ids[start:stop].copy(), self.loss_mask[start:stop].copy(), self.origin)
