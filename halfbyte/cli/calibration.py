"""The text that commands calibrate on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from halfbyte.config import DataSection
from halfbyte.errors import DataError

if TYPE_CHECKING:
    import torch
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

ROWS, ROW_TOKENS, ROWS_PER_BATCH = 64, 512, 4


def read_calibration(
    file: str,
    options: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    *,
    num_rows: int,
    held_out_seed: int | None = None,
) -> list[torch.Tensor]:
    """Return batches of token ids, rows filled with one example after the other.

    Args:
        file: Examples, in any layout that training takes.
        options: How examples are read.
        tokenizer: Of the model.
        console: Is told how far it is.
        num_rows: Rows at most.
        held_out_seed: Leaves out what a run of this seed held out of the file; None takes all examples.

    Raises:
        DataError: The examples do not fill one row.
    """
    import numpy as np
    import torch

    from halfbyte.data import build_renderer, split_held_out
    from halfbyte.train.progress import prepare_examples, read_examples

    loaded = read_examples(file, options, console)
    renderer = build_renderer(
        tokenizer, chat_template=options.chat_template, system=options.system, train_on=options.train_on
    )
    examples = loaded.examples
    if held_out_seed is not None:
        examples, _ = split_held_out(examples, options.held_out_fraction, held_out_seed)
    prepared = prepare_examples(examples, renderer, options, console)
    tokens = np.concatenate([example.input_ids for example in prepared.examples])
    num_rows = min(num_rows, len(tokens) // ROW_TOKENS)
    if num_rows == 0:
        raise DataError(f"{file} has {len(tokens)} tokens; calibration needs {ROW_TOKENS} at least")
    rows = torch.from_numpy(tokens[: num_rows * ROW_TOKENS].astype(np.int64)).view(num_rows, ROW_TOKENS)
    return list(rows.split(ROWS_PER_BATCH))
