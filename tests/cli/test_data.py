"""halfbyte data: the learned tokens are marked, what is lost is said, and bad input is one line."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from halfbyte.cli.console import printable
from halfbyte.cli.data import show_example
from halfbyte.data import TokenSpan
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]


def test_data_marks_what_is_learned(halfbyte: Run, model_folder: Path, examples_file: Path) -> None:
    done = halfbyte("data", examples_file, "--model", model_folder, "--show=2")
    assert (done.code, done.err) == (0, "")
    assert "24 rows, read as question_answer" in done.out
    assert "24 examples, " in done.out
    assert "tickets.jsonl:1 ([[...]] is learned)" in done.out
    assert "<|im_start|>assistant\n[[yes<|im_end|>]]" in done.out
    assert "tickets.jsonl:3 (" not in done.out


def test_data_says_what_is_cut_and_why(halfbyte: Run, model_folder: Path, examples_file: Path) -> None:
    whole = json.loads(halfbyte("data", examples_file, "--model", model_folder, "--json").out)["prepared"]
    limit = f"--data.max_length={max(whole['lengths']) - 2}"
    cut = halfbyte("data", examples_file, "--model", model_folder, limit)
    assert cut.code == 0
    assert "were cut; " in cut.out
    assert "lost 1 to learn" in cut.out
    dropped = halfbyte("data", examples_file, "--model", model_folder, limit, "--data.overlong=drop")
    assert "examples left out: over " in dropped.out
    assert f"{examples_file}:12" in dropped.out


def test_data_gives_everything_as_json(halfbyte: Run, model_folder: Path, examples_file: Path) -> None:
    done = halfbyte("data", examples_file, "--model", model_folder, "--json", "--show", "1")
    record = json.loads(done.out)
    assert record["read"]["format"] == "question_answer"
    assert len(record["prepared"]["lengths"]) == 24
    (spans,) = record["shown"].values()
    assert [span["text"] for span in spans if span["is_trained"]] == ["yes<|im_end|>"]


def test_show_example_uses_colour_only_where_there_is_some() -> None:
    spans = [TokenSpan("read", False), TokenSpan("learned", True)]
    texts = {}
    for name, options in {"terminal": {"force_terminal": True, "color_system": "standard"}, "pipe": {}}.items():
        stream = io.StringIO()
        show_example(Console(file=stream, soft_wrap=True, **options), "f:1", spans)
        texts[name] = stream.getvalue()
    assert "\x1b[1;32mlearned\x1b[0m" in texts["terminal"]
    assert "[[" not in texts["terminal"]
    assert "read[[learned]]" in texts["pipe"]
    assert "\x1b" not in texts["pipe"]


def test_printable_writes_control_characters_out() -> None:
    assert printable("a\x1b[31mb\x07\n\tc\u00e9") == "a\\x1b[31mb\\x07\n\tc\u00e9"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tickets.jsonl"),
        ("", "tickets.jsonl"),
        ('{"question": "a", "answer": "b"}\n{"question": \n', "tickets.jsonl:2"),
        ('{"colour": "a", "size": "b"}\n', "tickets.jsonl:1: the columns fit no kn"),
        ('{"question": "a", "answer": ""}\n', "tickets.jsonl:1"),
        (b'{"question": "\xe9", "answer": "b"}\n', "tickets.jsonl"),
    ],
)
def test_data_refuses_bad_files_in_one_message(
    halfbyte: Run, model_folder: Path, tmp_path: Path, content: str | bytes | None, message: str
) -> None:
    path = tmp_path / "tickets.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    done = halfbyte("data", path, "--model", model_folder)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("halfbyte: error: ")
    assert message in done.err


def test_data_refuses_missing_models_and_bad_templates(halfbyte: Run, model_folder: Path, examples_file: Path) -> None:
    for words, message in (
        (["--model", "nowhere/at-all"], "nowhere/at-all"),
        (["--model", model_folder, "--data.chat_template={{ messages[-1].content }}"], "tickets.jsonl:1"),
        (["--model", model_folder, "--data.overlong=shorten"], "data.overlong is 'shorten'; allowed: cut, drop, error"),
        (["--model", model_folder, "--data.max_length=20", "--data.overlong=error"], "tickets.jsonl:1"),
        ([], "required: --model; see halfbyte data --help"),
    ):
        done = halfbyte("data", examples_file, *words)
        assert done.code == 2, done
        assert message in done.err
