from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.memory.shapes import CONFIGS


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIGS["Llama-7B"]))
    return path


def test_plan_shows_bytes_choice_and_neighbours(halfbyte: Callable[..., Any], config_file: Path) -> None:
    done = halfbyte("plan", config_file, "--gpu", "8GiB", "--host", "32GiB", "--train.batch_size=16")
    assert done.code == 0
    for words in ("6.74 billion weights", "16 x 1024 tokens a step", "in all", "speed: about", "next faster"):
        assert words in done.out
    assert "assumed" not in done.out
    assert "64GiB assumed" in halfbyte("plan", config_file, "--gpu", "8GiB").out


def test_plan_as_json_adds_up(halfbyte: Callable[..., Any], config_file: Path) -> None:
    done = halfbyte("plan", config_file.parent, "--gpu", "RTX 4090", "--json")
    record = json.loads(done.out)
    assert record["fits"]
    best = record["best"]
    assert sum(entry["device_bytes"] for entry in best["entries"]) == best["device_bytes"]
    assert record["card"]["name"] == "RTX 4090"


def test_plan_reads_a_run_and_the_device_at_hand(
    halfbyte: Callable[..., Any], config_file: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run.yaml"
    run.write_text(f"model: {{path: {config_file}}}\nlora: {{rank: 64}}\ntrain: {{optim: paged_adamw_8bit}}\n")
    done = halfbyte("plan", run, "--gpu", "24GiB")
    assert "rank 64" in done.out
    assert "paged" in done.out
    assert "CPU cores" in halfbyte("plan", run, "--gpu", "cpu", "--host", "900GiB").out


def test_plan_over_data_says_how_long_it_takes(
    halfbyte: Callable[..., Any], model_folder: Path, examples_file: Path
) -> None:
    done = halfbyte("plan", model_folder, examples_file, "--gpu", "8GiB", "--data.max_length=64")
    assert "data: 24 examples" in done.out
    assert "minutes" in done.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "H900"], "no such card is known"),
        (["--gpu", "2GiB"], "does not fit"),
        (["--host", "lots"], "--host is 'lots'"),
    ],
)
def test_plan_refuses_with_what_to_do(
    halfbyte: Callable[..., Any], config_file: Path, words: list[str], message: str
) -> None:
    done = halfbyte("plan", config_file, "--gpu", "8GiB", *words) if "--gpu" not in words else None
    done = done or halfbyte("plan", config_file, *words)
    assert done.code == 2
    assert message in done.err


def test_plan_of_no_model_says_so(halfbyte: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[1")
    assert "is no JSON" in halfbyte("plan", tmp_path, "--gpu", "8GiB").err
    assert "config.json is missing" in halfbyte("plan", tmp_path.parent, "--gpu", "8GiB").err


def test_several_cards_share_a_batch_and_what_visits_them(halfbyte: Callable[..., Any], config_file: Path) -> None:
    one = json.loads(halfbyte("plan", config_file, "--gpu", "24GiB", "--json", "--train.batch_size=4").out)
    two = json.loads(halfbyte("plan", config_file, "--gpus", "2x24GiB", "--json", "--train.batch_size=8").out)
    assert two["run"]["batch_rows"] == one["run"]["batch_rows"]
    assert two["best"]["choice"] == one["best"]["choice"]
    # Twice the tokens in the time of one, and of adding up gradients.
    assert 1.5 < two["best"]["tokens_per_second"] / one["best"]["tokens_per_second"] < 2
    text = halfbyte("plan", config_file, "--gpus", "2x24GiB", "--train.batch_size=8").out
    assert "gradients are added up once a step" in text
    odd = halfbyte("plan", config_file, "--gpus", "2x24GiB", "--train.batch_size=7")
    assert odd.code == 2
    assert "7, which 2 ranks cannot share" in odd.err
    assert "such as 2x24GiB" in halfbyte("plan", config_file, "--gpus", "24GiB").err
