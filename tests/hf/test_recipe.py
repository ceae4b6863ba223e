"""The recipe that people already have runs after only its import lines are changed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel as PeftsOwnModel
from transformers import AutoModelForCausalLM as TransformersModel

from halfbyte.errors import ConfigError
from halfbyte.hf import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LoraConfig,
    PeftModel,
    SFTConfig,
    SFTTrainer,
    TrainingArguments,
    get_peft_model,
)
from tests.oracles import assert_close
from tests.train.tiny import build_tiny, build_tokenizer

# peft 0.21.2 reads an attribute that transformers 5.23 is about to rename.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
RECIPE = Path(__file__).with_name("recipe.py")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    build_tiny("llama").to(torch.bfloat16).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return [{"text": f"Question {n}: what is {n} plus one? Answer: {n + 1}."} for n in range(24)]


@pytest.fixture(scope="module")
def tickets(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> Path:
    path = tmp_path_factory.mktemp("data") / "tickets.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(folder: Path):  # type: ignore[no-untyped-def]
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def test_recipe_runs_with_only_its_imports_changed(model_folder: Path, tickets: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    environment["HF_HOME"] = str(tmp_path / "hub")
    done = subprocess.run(
        [sys.executable, str(RECIPE), str(model_folder), str(tickets)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "trainable params: " in done.stdout
    assert "answer: How do I" in done.stdout
    assert "merged: " in done.stdout
    assert "no longer in 4 bits" in done.stderr
    results = tmp_path / "results"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= {p.name for p in results.iterdir()}
    own = PeftsOwnModel.from_pretrained(TransformersModel.from_pretrained(model_folder), results)
    assert any(p.abs().sum() > 0 for name, p in own.named_parameters() if "lora_B" in name)


def test_sft_trainer_learns_every_token_of_plain_text(
    model_folder: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    trainer = SFTTrainer(
        model=load(model_folder),
        args=SFTConfig(output_dir=str(tmp_path), max_length=64, report_to=[], use_cpu=True),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model_folder),
        peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
    )
    example = trainer.train_dataset[0]
    assert example.loss_mask[1:].all()
    assert list(example.input_ids).count(trainer.processing_class.eos_token_id) == 1


def test_sft_trainer_saves_the_adapter_where_scripts_save_the_model(
    model_folder: Path, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    model = get_peft_model(load(model_folder), LoraConfig(r=4, target_modules=TARGETS))
    args = TrainingArguments(output_dir=str(tmp_path / "run"), max_steps=2, report_to=[], use_cpu=True)
    trainer = SFTTrainer(model, args, rows, tokenizer=AutoTokenizer.from_pretrained(model_folder), max_seq_length=64)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "saved")
    again = PeftModel.from_pretrained(load(model_folder), tmp_path / "saved")
    ids = torch.arange(5, 15)[None]
    # The trained model's layers are fused, the loaded one's are not: another order of summation.
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    with again.disable_adapter():
        assert not torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_dora_is_asked_for_as_in_peft(model_folder: Path, tmp_path: Path) -> None:
    model = get_peft_model(load(model_folder), LoraConfig(r=4, target_modules=TARGETS, use_dora=True))
    names = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {"lora_A", "lora_B", "lora_magnitude_vector"}
    model.save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).use_dora


def test_merge_and_unload_keeps_what_was_learned(model_folder: Path) -> None:
    model = get_peft_model(load(model_folder), LoraConfig(r=4, target_modules=TARGETS)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.02)
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids).logits
    merged = model.merge_and_unload()
    assert not hasattr(merged.config, "quantization_config")
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    # Fair rounding moves a weight by up to a whole step, and each of two layers has about ten products in a row.
    assert_close("merged logits", before, merged.float()(input_ids=ids).logits, dtype=torch.bfloat16, roundings=8)


def test_plain_model_without_quantization_config_is_what_transformers_loads(model_folder: Path) -> None:
    ours = AutoModelForCausalLM.from_pretrained(model_folder)
    theirs = TransformersModel.from_pretrained(model_folder)
    ids = torch.arange(5, 15)[None]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: BitsAndBytesConfig(load_in_8bit=True), "load_in_8bit"),
        (lambda f: LoraConfig(lora_bias=True), "lora_bias"),
        (lambda f: LoraConfig(init_lora_weights="pissa"), "in 4 bits already"),
        (lambda f: LoraConfig(bias="all"), "bias"),
        (lambda f: AutoModelForCausalLM.from_pretrained(f, torch_dtyp="auto"), "did you mean torch_dtype"),
        (lambda f: AutoModelForCausalLM.from_pretrained(f, max_memory={0: "8GiB"}), "max_memory"),
        (lambda f: TrainingArguments("out", learning_rat=1e-4), "did you mean learning_rate"),
        (lambda f: SFTConfig("out", neftune_noise_alpha=5), "neftune_noise_alpha"),
        (lambda f: SFTTrainer(load(f), None, [{"text": "a"}], peft_config=LoraConfig(), paking=True), "paking"),
    ],
)
def test_an_argument_that_cannot_be_honoured_is_an_error(model_folder: Path, call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=message):
        call(model_folder)


def test_names_that_are_not_there_are_listed() -> None:
    with pytest.raises(ImportError, match="cannot import name 'DPOTrainer'"):
        exec("from halfbyte.hf import DPOTrainer")
