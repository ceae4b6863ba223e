"""The demo from end to end, on a tiny random model that cannot learn the shop."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from examples.shop.demo import demo_config, main
from examples.shop.scoring import HELD_OUT, TICKETS
from tests.train.tiny import build_tiny, build_tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    build_tiny("llama").save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def test_demo_config_trains_on_the_tickets_and_holds_out_the_questions(tmp_path: Path) -> None:
    config = demo_config("model", tmp_path / "out", num_epochs=1)
    assert (config.data.train, config.data.held_out) == (str(TICKETS), str(HELD_OUT))
    assert config.quant.enabled
    assert config.train.num_train_epochs == 1


def test_main_trains_scores_merges_and_says_that_too_little_was_learned(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "shop"
    assert main([str(model_folder), "--output", str(out), "--epochs", "0.02"]) == 1
    shown = capsys.readouterr().out
    assert "0 of 84" in shown
    assert "NOT REACHED" in shown
    assert (out / "adapter_model.safetensors").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "shop-merged").num_parameters() > 0


def test_main_says_what_is_wrong_with_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nothing.gguf"), "--output", str(tmp_path / "shop")]) == 1
    assert "error: " in capsys.readouterr().out
