"""Every file of real data, from its name to packed rows."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from halfbyte.data.load import load_examples
from halfbyte.data.packing import PackedDataset
from halfbyte.data.prepare import prepare
from halfbyte.data.render import build_renderer
from halfbyte.data.split import split_held_out

DATA_DIR = Path(os.environ.get("HALFBYTE_DATA_DIR", ""))
pytestmark = pytest.mark.skipif(
    "HALFBYTE_DATA_DIR" not in os.environ, reason="HALFBYTE_DATA_DIR does not name the real data sets"
)
PAIR = {"prompt": "text", "completion": "category"}


@pytest.mark.parametrize(
    ("name", "columns", "format_name", "num_examples"),
    [
        ("bitext/Bitext_Sample_Customer_Support_Training_Dataset.csv", {}, "instruction_response", 4514),
        ("gsm8k/train.jsonl", {}, "question_answer", 7473),
        ("gsm8k/test.jsonl", {}, "question_answer", 1319),
        ("banking77/train.csv", {}, "text", 10003),
        ("banking77/test.csv", PAIR, "prompt_completion", 3080),
        ("sgd/train_dialogues_001.json", {}, "sgd", 128),
        ("sgd/train_dialogues_002.json", {}, "sgd", 128),
        ("sgd/train_dialogues_003.json", {}, "sgd", 128),
        ("sgd/dev_dialogues_001.json", {}, "sgd", 128),
        ("self_instruct/seed_tasks.jsonl", {}, "self_instruct", 175),
        ("self_instruct/user_oriented_instructions.jsonl", {}, "self_instruct", 252),
        ("bitext", {}, "instruction_response", 4514),
        ("gsm8k", {}, "question_answer", 7473),
        ("banking77", PAIR, "prompt_completion", 10003),
        ("sgd", {}, "sgd", 384),
        ("self_instruct", {}, "self_instruct", 427),
    ],
)
def test_load_examples_reads_real_data(name: str, columns: dict[str, str], format_name: str, num_examples: int) -> None:
    loaded = load_examples(DATA_DIR / name, columns=columns)
    assert loaded.format == format_name
    assert len(loaded) == num_examples
    assert loaded.report.dropped == ()


def test_load_examples_keeps_quoted_line_breaks() -> None:
    loaded = load_examples(DATA_DIR / "bitext")
    answers = [example.messages[1]["content"] for example in loaded.examples if example.messages]
    assert len(set(answers)) == 4513
    assert sum("\r\n" in answer for answer in answers) > 1000
    assert int(loaded.examples[-1].origin.rpartition(":")[2]) > 30_000


@pytest.mark.parametrize("name", ["bitext", "gsm8k/test.jsonl", "banking77/test.csv", "sgd", "self_instruct"])
def test_prepare_takes_real_data_to_packed_rows(byte_level: PreTrainedTokenizerFast, name: str) -> None:
    training, held_out = split_held_out(load_examples(DATA_DIR / name).examples, 0.05, 0)
    assert held_out
    prepared = prepare(training[:300], build_renderer(byte_level), max_length=4096)
    num_left_out = len(prepared.report.dropped)
    assert len(prepared.examples) == min(300, len(training)) - num_left_out
    assert num_left_out <= 3
    for example in prepared.examples:
        if len(example) < 4096:
            assert example.loss_mask[-1]
    dataset = PackedDataset(prepared.examples, row_tokens=4096, pad_id=byte_level.pad_token_id)
    assert sum(len(dataset[index].origins) for index in range(len(dataset))) == len(prepared.examples)
