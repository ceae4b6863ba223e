"""Options of the data: where the examples come from, and what the model sees of them."""

from __future__ import annotations

import dataclasses
from typing import Literal

from halfbyte.config.option import option
from halfbyte.config.values import check_section


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """The examples"""

    train: str
    """File or folder (jsonl, json, csv, tsv, parquet, txt), or the name of a data set on the hub."""
    held_out: str | None = None
    """Examples kept out of training to measure it on. none: a share of data.train."""
    held_out_fraction: float = option(0.05, minimum=0, below=1)
    """Share of data.train held out where data.held_out is none. 0: no measuring."""
    split: str = "train"
    """Split of a data set on the hub."""
    format: str | None = None
    """How examples are laid out: messages, sharegpt, alpaca, prompt_completion, instruction_response,
    question_answer, text, ... none: recognised by the columns, and said."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """What the format's columns are called in this data: prompt=question,completion=reply."""
    system: str | None = None
    """System prompt for examples that have none."""
    chat_template: str | None = None
    """Jinja template, the path of one, or a built-in one's name (chatml, headings). none: the tokenizer's own."""
    train_on: Literal["assistant", "all"] = "assistant"
    """Which tokens are learned: the assistant's, or all."""
    max_length: int = option(1024, minimum=2, aliases=("max_seq_length",))
    """Tokens an example may have, and tokens of a packed row."""
    overlong: Literal["cut", "drop", "error"] = "cut"
    """What to do with a longer example."""
    packing: bool = True
    """Fill rows of max_length tokens with several examples, kept apart. false: pad."""

    def __post_init__(self) -> None:
        check_section(self, "data")
