"""The main job by the command line: train, then everything one does with what comes out; and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from halfbyte.cli.main import main
from halfbyte.config import load_config
from tests.cli.conftest import Outcome

Run = Callable[..., Outcome]
TRAINING = [
    "--train.num_train_epochs=2",
    "--train.learning_rate=0.01",
    "--train.per_device_train_batch_size=1",
    "--train.warmup_ratio=0",
    "--train.num_samples=1",
    "--train.max_sample_tokens=4",
    "--data.max_length=128",
    "--data.held_out_fraction=0.2",
    "--lora.rank=4",
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, examples_file: Path) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "out"
    assert main(["train", str(model_folder), str(examples_file), "--output", str(folder), *TRAINING]) == 0
    return folder


def test_train_leaves_a_whole_run(run_folder: Path, model_folder: Path, examples_file: Path) -> None:
    config = load_config(run_folder / "run.yaml")
    assert (config.model.path, config.data.train) == (str(model_folder), str(examples_file))
    assert (config.lora.rank, config.output_dir) == (4, str(run_folder))
    names = {path.name for path in run_folder.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "summary.json", "logs", "tokenizer.json"}
    assert AutoPeftModelForCausalLM.from_pretrained(run_folder).peft_config["default"].r == 4


def test_train_refuses_a_folder_that_holds_a_run(
    halfbyte: Run, run_folder: Path, model_folder: Path, examples_file: Path
) -> None:
    before = (run_folder / "adapter_model.safetensors").read_bytes()
    done = halfbyte("train", model_folder, examples_file, "--output", run_folder, *TRAINING)
    assert done.code == 2
    assert "already holds a finished run; replace it with --overwrite" in done.err
    assert (run_folder / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora.targets=quack_proj"], "quack_proj"),
        (["--data.chat_template={{ messages[-1].content }}"], "template"),
        (["--model.device=cuda:99"], "model.device is 'cuda:99'"),
        (["--data.format=alpaca"], "tickets.jsonl:1"),
        (["--data.held_out=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_train_refuses_before_the_first_step(
    halfbyte: Run, tmp_path: Path, model_folder: Path, examples_file: Path, words: list[str], message: str
) -> None:
    done = halfbyte("train", model_folder, examples_file, "--output", tmp_path / "out", *TRAINING, *words)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_train_names_its_folder_aloud(
    halfbyte: Run, tmp_path: Path, model_folder: Path, examples_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = halfbyte("train", model_folder, examples_file, *TRAINING, "--train.max_steps=1")
    assert done.code == 0
    assert "runs/tiny-llama-tickets-1" in done.err
    assert (tmp_path / "runs" / "tiny-llama-tickets-1" / "adapter_model.safetensors").exists()


def test_train_resumes_and_overwrites_a_run(
    halfbyte: Run, tmp_path: Path, model_folder: Path, examples_file: Path
) -> None:
    out = tmp_path / "out"
    first = halfbyte("train", model_folder, examples_file, "--output", out, *TRAINING, "--train.max_steps=1")
    assert (first.code, (out / "checkpoint-1").exists()) == (0, True)
    resumed = halfbyte("train", out / "run.yaml", "--resume", "--train.max_steps=3")
    assert resumed.code == 0
    assert "step 3/3" in resumed.err
    assert "step 1/3" not in resumed.err
    assert load_config(out / "run.yaml").train.max_steps == 3
    replaced = halfbyte("train", out / "run.yaml", "--overwrite", "--train.max_steps=2", "--lora.rank=2")
    assert replaced.code == 0
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-2"}
    assert load_config(out / "run.yaml").lora.rank == 2
    nothing = halfbyte("train", model_folder, examples_file, "--output", tmp_path / "new", "--resume")
    assert nothing.code == 2
    assert "holds no checkpoint; leave --resume out to start a run there" in nothing.err


def test_eval_measures_with_and_without_the_adapter(halfbyte: Run, run_folder: Path, held_out_file: Path) -> None:
    done = halfbyte("eval", run_folder, held_out_file, "--json")
    assert done.code == 0
    figures = json.loads(done.out)
    assert figures["num_examples"] == 4
    assert figures["tuned"]["loss"] < figures["base"]["loss"]
    assert figures["tuned"]["num_tokens"] == figures["base"]["num_tokens"] > 0
    readable = halfbyte("eval", run_folder, held_out_file)
    assert f"tuned:  loss {figures['tuned']['loss']:.4f}, perplexity" in readable.out


def test_generate_answers_alike_however_it_is_asked(
    halfbyte: Run, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = ["--max-new-tokens=6"]
    streamed = halfbyte("generate", run_folder, "Item 1?", *short)
    assert streamed.code == 0
    (tmp_path / "prompts.txt").write_text("Item 1?\n\nItem 2?\n")
    listed = halfbyte("generate", run_folder, "--file", tmp_path / "prompts.txt", "--json", "--compare", *short)
    records = [json.loads(line) for line in listed.out.splitlines()]
    assert [record["prompt"] for record in records] == ["Item 1?", "Item 2?"]
    assert records[0]["answer"] == streamed.out.removesuffix("\n")
    assert records[0]["base_answer"] != records[0]["answer"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Item 1?\nItem 2?\n"))
    piped = halfbyte("generate", run_folder, *short)
    assert piped.out == "".join(f"prompt: {record['prompt']}\ntuned:  {record['answer']}\n\n" for record in records)
    assert halfbyte("generate", run_folder, "Item", "--raw", *short).code == 0


def test_generate_refuses_prompts_it_does_not_have(
    halfbyte: Run, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    for words, message in (
        ([], "standard input holds no prompt"),
        (["a", "--file=b"], "give a prompt or --file, not both"),
        (["--file", tmp_path / "absent"], "absent cannot be read"),
        (["--file", tmp_path / "latin.txt"], "latin.txt cannot be read"),
        (["a", "--temperature=-1"], "temperature is -1.0; allowed: 0 or above"),
        (["a" * 300], "leaves no room in this model's context of 256"),
    ):
        done = halfbyte("generate", run_folder, *words)
        assert done.code == 2
        assert message in done.err


def test_chat_holds_a_conversation(halfbyte: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Item 1?\n\nItem 2?\n/reset\nItem 1?\n/quit\nnever read\n"))
    done = halfbyte("chat", run_folder, "--max-new-tokens=4", "--compare")
    assert done.code == 0
    turns = done.out.split("\nyou: ")[1:]
    assert [bool(turn.strip()) for turn in turns] == [True, False, True, False, True, False]
    assert turns[0] == turns[4]
    assert turns[0].startswith("base: ")
    assert "\ntuned: " in turns[2]
    assert "never read" not in done.out


def test_chat_says_when_the_conversation_has_outgrown_the_model(
    halfbyte: Run, run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{'a' * 300}\nItem 1?\n"))
    done = halfbyte("chat", run_folder, "--max-new-tokens=4")
    assert done.code == 0
    assert done.out.count("/reset forgets the conversation") == 2
    assert "context of 256" in done.out


@pytest.mark.parametrize("onto", ["original", "dequantized"])
def test_merge_gives_a_plain_model(
    halfbyte: Run, run_folder: Path, held_out_file: Path, tmp_path: Path, onto: str
) -> None:
    merged = tmp_path / "merged"
    done = halfbyte("merge", run_folder, merged, "--onto", onto, "--dtype=float32")
    assert done.code == 0
    assert str(merged) in done.err
    AutoModelForCausalLM.from_pretrained(merged)
    tuned = json.loads(halfbyte("eval", run_folder, held_out_file, "--json").out)["tuned"]["loss"]
    plain = json.loads(halfbyte("eval", merged, held_out_file, "--json", "--data.max_length=128").out)["model"]["loss"]
    # Onto the dequantised base it is the very model that was trained, in another order of summation.
    assert plain == pytest.approx(tuned, rel=1e-3 if onto == "dequantized" else 0.2)
    again = halfbyte("merge", run_folder, merged)
    assert (again.code, again.out) == (2, "")
    assert "already holds a model; name another folder" in again.err


def test_merge_into_4_bits_keeps_the_adapter(
    halfbyte: Run, run_folder: Path, examples_file: Path, held_out_file: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    done = halfbyte("merge", run_folder, merged, "--bits=4", "--calibrate", examples_file, "--rows=4")
    assert done.code == 0, done.err
    assert "calibrated on" in done.err
    assert json.loads((merged / "config.json").read_text())["quantization_config"]["load_in_4bit"]
    tuned = json.loads(halfbyte("eval", run_folder, held_out_file, "--json").out)
    kept = json.loads(halfbyte("eval", merged, held_out_file, "--json", "--data.max_length=128").out)["model"]["loss"]
    base, after = tuned["base"]["loss"], tuned["tuned"]["loss"]
    assert kept < base - 0.5 * (base - after)
    refused = halfbyte("merge", run_folder, tmp_path / "other", "--bits=4", "--onto=original")
    assert "--bits 4 goes with --onto dequantized" in refused.err
    for words, message in (
        (["--bits=4", "--dtype=float32"], "--dtype is not for --bits 4"),
        (["--rows=4"], "--calibrate and --rows go with --bits 4"),
    ):
        assert message in halfbyte("merge", run_folder, tmp_path / "other", *words).err


def test_quantize_can_be_calibrated(halfbyte: Run, model_folder: Path, examples_file: Path, tmp_path: Path) -> None:
    done = halfbyte("quantize", model_folder, tmp_path / "nf4", "--calibrate", examples_file, "--rows=2")
    assert done.code == 0, done.err
    assert "14 linear layers in nf4" in done.err
    short = tmp_path / "short.jsonl"
    short.write_text(examples_file.read_text().splitlines()[0] + "\n")
    refused = halfbyte("quantize", model_folder, tmp_path / "other", "--calibrate", short)
    assert "calibration needs 512 at least" in refused.err
    refused = halfbyte("quantize", model_folder, tmp_path / "other", "--rows=4")
    assert "--rows goes with --calibrate" in refused.err
    assert not (tmp_path / "other").exists()


def test_merge_refuses_a_model_without_an_adapter(halfbyte: Run, model_folder: Path, tmp_path: Path) -> None:
    done = halfbyte("merge", model_folder, tmp_path / "merged")
    assert done.code == 2
    assert "is a model without an adapter; there is nothing to merge" in done.err


def test_quantize_writes_what_halfbyte_and_transformers_load(
    halfbyte: Run, model_folder: Path, held_out_file: Path, tmp_path: Path
) -> None:
    done = halfbyte("quantize", model_folder, tmp_path / "nf4", "--quant.double_quant=false", "--dtype=float16")
    assert done.code == 0
    config = json.loads((tmp_path / "nf4" / "config.json").read_text())["quantization_config"]
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_use_double_quant"]) == ("nf4", False)
    assert config["bnb_4bit_compute_dtype"] == "float16"
    words = ["--json", "--data.max_length=128"]
    stored = halfbyte("eval", tmp_path / "nf4", held_out_file, *words)
    loaded = halfbyte("eval", model_folder, held_out_file, *words, "--quant.enabled", "--quant.double_quant=false")
    # The same 4-bit weights; norms are fp32 in this model and 16-bit in the checkpoint.
    assert json.loads(stored.out)["model"]["loss"] == pytest.approx(json.loads(loaded.out)["model"]["loss"], rel=1e-3)


def test_commands_refuse_damaged_and_foreign_files(
    halfbyte: Run, run_folder: Path, model_folder: Path, held_out_file: Path, tmp_path: Path
) -> None:
    truncated = shutil.copytree(model_folder, tmp_path / "truncated")
    weights = truncated / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    foreign = shutil.copytree(run_folder, tmp_path / "foreign")
    tensors = load_file(foreign / "adapter_model.safetensors")
    renamed = {name.replace("layers.0", "layers.7"): tensor for name, tensor in tensors.items()}
    save_file(renamed, foreign / "adapter_model.safetensors")
    pickled = shutil.copytree(model_folder, tmp_path / "pickled") / "pickled.bin"
    torch.save({"run": print}, pickled)
    for words, message in (
        (["eval", truncated, held_out_file], "model.safetensors"),
        (["eval", foreign, held_out_file], "layers.7"),
        (["quantize", pickled, tmp_path / "out"], "pickled.bin"),
        (["chat", tmp_path / "nowhere"], "nowhere"),
        (["generate", model_folder, "a", "--compare"], "has no adapter, so there is no base to compare it with"),
    ):
        done = halfbyte(*words)
        assert done.code == 2
        assert done.err.splitlines()[-1] != ""
        assert "Traceback" not in done.err
        assert message in done.err
