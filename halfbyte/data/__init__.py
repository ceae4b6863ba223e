"""From a file of examples to batches of tokens.

load_examples -> Example -> prepare (Renderer) -> TokenizedExample -> PackedDataset -> PackedRow -> collate_packed
                                                                   -> LengthGroupedSampler -> collate_padded
"""

from halfbyte.data.collate import Batch, collate_packed, collate_padded
from halfbyte.data.examples import Dropped, Example, Message, TokenizedExample
from halfbyte.data.load import ExampleSet, LoadReport, examples_from_rows, load_examples
from halfbyte.data.packing import PackedDataset, PackedRow, make_row, pack_best_fit
from halfbyte.data.prepare import PreparedData, prepare
from halfbyte.data.render import Renderer, build_renderer
from halfbyte.data.report import DataReport, TokenSpan, token_spans
from halfbyte.data.sampler import LengthGroupedSampler, ShuffledSampler, make_order
from halfbyte.data.split import split_held_out

__all__ = [
    "Batch",
    "DataReport",
    "Dropped",
    "Example",
    "ExampleSet",
    "LengthGroupedSampler",
    "LoadReport",
    "Message",
    "PackedDataset",
    "PackedRow",
    "PreparedData",
    "Renderer",
    "ShuffledSampler",
    "TokenSpan",
    "TokenizedExample",
    "build_renderer",
    "collate_packed",
    "collate_padded",
    "examples_from_rows",
    "load_examples",
    "make_order",
    "make_row",
    "pack_best_fit",
    "prepare",
    "split_held_out",
    "token_spans",
]
