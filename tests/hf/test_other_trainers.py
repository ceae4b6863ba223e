"""trl's trainers and transformers' own train our 4-bit model, as they train PEFT's."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorForLanguageModeling, PreTrainedModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from halfbyte.errors import ConfigError
from halfbyte.export import export_bnb4bit
from halfbyte.hf import AutoModelForCausalLM, BitsAndBytesConfig, LoraConfig, PeftModel, get_peft_model
from halfbyte.nn import Linear4bit
from halfbyte.nn.convert import replace_module
from halfbyte.nn.saved_module import plain_linear
from halfbyte.quant import QuantSpec
from tests.train.tiny import build_tiny, build_tokenizer

# transformers 5.23 renames gradient_checkpointing; trl 1.16 and peft 0.21.2 use the old name still.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PAIRS = [{"prompt": f"Is {n} odd?", "chosen": f" yes {n}", "rejected": f" no {n}"} for n in range(8)]
TEXTS = [{"text": f"Question {n}: what is {n} plus one? Answer: {n + 1}."} for n in range(8)]
IDS = torch.arange(5, 25)[None]
# Sums in fp32 taken in another order differ by about sqrt(100) roundings of 6e-8 a product, and a run has some twenty
# products in a row and four steps: 1e-5 in all, relative to losses of about 1 and values of about 0.1.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_tiny("llama").save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def load_base(folder: Path) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")


def adapted(folder: Path, **options: Any) -> PeftModel:
    return get_peft_model(load_base(folder), LoraConfig(r=4, target_modules=TARGETS, **options))


def disturb(model: PeftModel) -> PeftModel:
    """Give fresh adapters an effect, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.05, generator=generator)
    return model


def twin_of(model: PeftModel, folder: Path) -> peft.PeftModel:
    """Return PEFT's own model of the same numbers: the weights dequantised, the adapter through its file."""
    model.save_pretrained(folder)
    base = build_tiny("llama")
    base.load_state_dict({k: v for k, v in dequantized(model).items() if k in base.state_dict()})
    return peft.PeftModel.from_pretrained(base, folder, is_trainable=True)


def dequantized(model: PeftModel) -> dict[str, torch.Tensor]:
    root = copy.deepcopy(model.get_base_model())
    for name, module in list(root.named_modules()):
        if isinstance(module, Linear4bit):
            replace_module(root, name, plain_linear(module))
    return {name.replace(".base.", "."): value for name, value in root.state_dict().items()}


def options_of(out: Path, **more: Any) -> dict[str, Any]:
    common = {
        "output_dir": str(out),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.5,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
    }
    return {**common, **more}


def dpo(model: nn.Module, out: Path, **more: Any) -> DPOTrainer:
    args = DPOConfig(**options_of(out, **more))
    return DPOTrainer(model, None, args, train_dataset=Dataset.from_list(PAIRS), processing_class=build_tokenizer())


def sft(model: nn.Module, out: Path, **more: Any) -> SFTTrainer:
    args = SFTConfig(**options_of(out, max_length=64, **more))
    return SFTTrainer(model, args, train_dataset=Dataset.from_list(TEXTS), processing_class=build_tokenizer())


def plain(model: nn.Module, out: Path, **more: Any) -> Trainer:
    tokenizer = build_tokenizer()
    rows = [{"input_ids": tokenizer(row["text"]).input_ids} for row in TEXTS]
    return Trainer(
        model,
        TrainingArguments(**options_of(out, **more)),
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
    )


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("build", [dpo, sft, plain])
def test_other_trainers_train_our_model_as_they_train_pefts(build: Any, folder: Path, tmp_path: Path) -> None:
    ours = disturb(adapted(folder))
    theirs = twin_of(ours, tmp_path / "start")
    of_ours, of_theirs = build(ours, tmp_path / "ours"), build(theirs, tmp_path / "theirs")
    of_ours.train()
    of_theirs.train()
    assert losses(of_ours)[-1] < losses(of_ours)[0]
    assert losses(of_ours) == pytest.approx(losses(of_theirs), rel=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(input_ids=IDS).logits, theirs.eval()(input_ids=IDS).logits, **TOLERANCE)


@pytest.mark.parametrize("build", [dpo, sft, plain])
def test_other_trainers_save_the_adapter_that_peft_loads(build: Any, folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    trainer = build(model, tmp_path / "out", save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for name in ("out/checkpoint-4", "final"):
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files
        assert "model.safetensors" not in files
    base = build_tiny("llama")
    base.load_state_dict({k: v for k, v in dequantized(model).items() if k in base.state_dict()})
    again = peft.PeftModel.from_pretrained(base, tmp_path / "final").eval()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, again(input_ids=IDS).logits, **TOLERANCE)


@pytest.mark.parametrize("build", [dpo, plain])
def test_a_checkpoint_in_4_bits_is_trained_by_others_too(build: Any, folder: Path, tmp_path: Path) -> None:
    # Its config says that it is quantised, at which other trainers look for bitsandbytes' own layers.
    export_bnb4bit(folder, tmp_path / "stored", QuantSpec(), dtype=torch.float32)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "stored", torch_dtype="float32", device_map="cpu")
    assert any(isinstance(module, Linear4bit) for module in stored.modules())
    trainer = build(get_peft_model(stored, LoraConfig(r=4, target_modules=TARGETS)), tmp_path / "run")
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_dpo_compares_a_fresh_adapter_with_its_base(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    trainer = dpo(model, tmp_path)
    assert trainer.ref_model is None
    assert list(model.peft_config) == ["default"]
    with model.disable_adapter(), torch.no_grad():
        before = model(input_ids=IDS).logits
    trainer.train()
    # Policy and reference are the same model before the first step: a loss of log 2 and no margin.
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    margins = [entry["rewards/margins"] for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert margins[0] == pytest.approx(0, abs=1e-6)
    assert margins[-1] > 0
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)


def test_dpo_compares_a_trained_adapter_with_what_it_was(folder: Path, tmp_path: Path) -> None:
    model = disturb(adapted(folder)).eval()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
    trainer = dpo(model, tmp_path)
    assert list(model.peft_config) == ["default", "ref"]
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2), abs=1e-6)
    model.eval()
    with torch.no_grad():
        after = model(input_ids=IDS).logits
        model.set_adapter("ref")
        assert torch.equal(model(input_ids=IDS).logits, before)
        model.set_adapter("default")
        assert torch.equal(model(input_ids=IDS).logits, after)
    assert not torch.equal(after, before)


def test_saving_writes_the_adapter_itself_while_its_copy_is_in_use(folder: Path, tmp_path: Path) -> None:
    model = disturb(adapted(folder))
    model.add_adapter("ref", model.peft_config["default"])
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    model.save_pretrained(tmp_path / "own")
    model.set_adapter("ref")
    model.save_pretrained(tmp_path / "other")
    names = [tmp_path / name / "adapter_model.safetensors" for name in ("own", "other")]
    assert names[0].read_bytes() == names[1].read_bytes()
    assert model.active_adapter == "ref"


@pytest.mark.parametrize("build", [dpo, sft, plain])
def test_gradient_checkpointing_changes_nothing(build: Any, folder: Path, tmp_path: Path) -> None:
    runs = []
    for on in (False, True):
        torch.manual_seed(0)
        trainer = build(disturb(adapted(folder)), tmp_path / str(on), max_steps=2, gradient_checkpointing=on)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_a_run_of_another_trainer_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    more = {"save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-2}
    torch.manual_seed(0)
    whole = plain(adapted(folder), tmp_path / "run", **more)
    whole.train()
    resumed = plain(adapted(folder), tmp_path / "run", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)


def test_a_best_checkpoint_is_put_back(folder: Path, tmp_path: Path) -> None:
    more = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    # The loss falls, and the best is said to be the largest: what has to come back is the first checkpoint.
    more |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = plain(disturb(adapted(folder)), tmp_path, **more)
    trainer.train()
    measured = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert measured[-1] < trainer.state.best_metric == measured[0]
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def test_modules_trained_whole_are_trained_by_dpo_too(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder, modules_to_save=["lm_head"])
    before = model.get_base_model().get_output_embeddings().trained.weight.detach().clone()
    trainer = dpo(model, tmp_path)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert not torch.equal(model.get_base_model().get_output_embeddings().trained.weight, before)


def test_all_of_pefts_class_is_ours_or_refused(folder: Path) -> None:
    model = adapted(folder)
    assert isinstance(model, PeftModel)
    assert isinstance(model, peft.PeftModel)
    ours = type(model).__mro__[: type(model).__mro__.index(peft.PeftModel)]
    names = {name for name in vars(peft.PeftModel) if not name.startswith("_")}
    inherited = {name for name in names if not any(name in vars(cls) for cls in ours)}
    assert inherited == set()
    assert model.has_active_enabled_adapter
    assert model.active_peft_config is model.peft_config["default"]
    with pytest.raises(ConfigError, match="get_model_status"):
        model.get_model_status()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.add_adapter("second"), "only 'ref', a copy of the adapter in use"),
        (lambda model: model.delete_adapter("second"), "no adapter named 'second'"),
        (lambda model: model.set_adapter("ref"), "no adapter 'ref'"),
        (lambda model: model.save_pretrained("somewhere", selected_adapters=["ref"]), "no adapter 'ref'"),
    ],
)
def test_what_adapters_cannot_do_is_an_error(folder: Path, call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call(adapted(folder))
