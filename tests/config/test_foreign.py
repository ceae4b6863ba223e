"""Configurations of other trainers: every key accounted for, and a run.yaml that says the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.config.foreign import KINDS, translate_file
from halfbyte.config.foreign.translation import Taken, Unneeded, Unsupported
from halfbyte.config.load import load_config
from halfbyte.errors import ConfigError

EXAMPLES = Path(__file__).parent / "examples"
TICKETS, CLUSTER, DESK = (
    EXAMPLES / name for name in ("axolotl_tickets.yml", "axolotl_cluster.yml", "llama_factory_desk.yaml")
)
LEAST = "base_model: m\nlearning_rate: 1e-4\nlora_r: 8\nlora_alpha: 16\nadapter: qlora\nload_in_4bit: true\n"
DATA = "datasets: [{path: d, type: chat_template}]\n"
LEAST_OF_FACTORY = "model_name_or_path: m\nstage: sft\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_axolotl_is_translated() -> None:
    translation = translate_file(TICKETS)
    assert translation.trainer == "Axolotl"
    assert translation.unsupported == []
    assert translation.values == {
        "model.path": "acme/desk-3b",
        "model.revision": "8f2c1d0",
        "model.dtype": "bfloat16",
        "quant.enabled": True,
        "quant.codebook": "fp4",
        "quant.double_quant": False,
        "lora.rank": 24,
        "lora.alpha": 48,
        "lora.dropout": 0.1,
        "lora.targets": "all-linear",
        "lora.modules_to_save": ("lm_head",),
        "lora.rslora": True,
        "data.train": "desk/train.jsonl",
        "data.held_out": "desk/held_out.jsonl",
        "data.format": "messages",
        "data.columns": {
            "messages": "log",
            "role": "who",
            "content": "said",
            "user": "customer|client",
            "assistant": "agent",
        },
        "data.chat_template": "chatml",
        "data.system": "You answer for the desk: be brief.",
        "data.max_length": 4096,
        "data.overlong": "cut",
        "data.packing": True,
        "data.train_on": "assistant",
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 8,
        "train.num_train_epochs": 2.5,
        "train.optim": "paged_adamw_32bit",
        "train.lr_scheduler_type": "cosine_with_min_lr",
        "train.lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "train.learning_rate": 1e-4,
        "train.loraplus_lr_ratio": 16,
        "train.warmup_steps": 20,
        "train.weight_decay": 0.01,
        "train.max_grad_norm": 0.5,
        "train.neftune_noise_alpha": 5,
        "train.seed": 7,
        "train.gradient_checkpointing": "offload",
        "train.logging_steps": 5,
        "train.eval_steps": 50,
        "train.save_steps": 100,
        "train.save_total_limit": 3,
        "train.report_to": ("wandb",),
        "output_dir": "out/desk",
    }


def test_defaults_of_axolotl_are_translated_where_ours_differ(tmp_path: Path) -> None:
    translation = translate_file(write(tmp_path / "a.yml", LEAST + DATA))
    assert {one.key: dict(one.outcome.values) for one in translation.said if one.line is None} == {
        "lora_dropout": {"lora.dropout": 0.0},
        "num_epochs": {"train.num_train_epochs": 1},
        "micro_batch_size": {"train.per_device_train_batch_size": 1},
        "max_grad_norm": {"train.max_grad_norm": 1.0},
        "optimizer": {"train.optim": "adamw_torch_fused"},
        "sequence_len": {"data.max_length": 512},
        "sample_packing": {"data.packing": False},
        "excess_length_strategy": {"data.overlong": "drop"},
        "val_set_size": {"data.held_out_fraction": 0.0},
    }


def test_llama_factory_is_translated(tmp_path: Path) -> None:
    explained = {"desk": {"file_name": "desk.json", "columns": {"prompt": "ask", "query": "more", "response": "reply"}}}
    write(tmp_path / "dataset_info.json", json.dumps(explained))
    path = write(tmp_path / "run.yaml", DESK.read_text().replace("DATA", str(tmp_path)))
    translation = translate_file(path)
    assert translation.trainer == "LLaMA-Factory"
    assert translation.unsupported == []
    assert translation.values == {
        "model.path": "acme/desk-3b",
        "model.dtype": "bfloat16",
        "quant.enabled": True,
        "lora.rank": 12,
        "lora.alpha": 24,
        "lora.dropout": 0.0,
        "lora.targets": ("q_proj", "v_proj"),
        "data.train": str(tmp_path / "desk.json"),
        "data.format": "prompt_completion",
        "data.columns": {"prompt": "ask", "input": "more", "completion": "reply"},
        "data.max_length": 1536,
        "data.packing": False,
        "data.held_out_fraction": 0.1,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": 8,
        "train.learning_rate": 1e-4,
        "train.num_train_epochs": 3.0,
        "train.lr_scheduler_type": "cosine",
        "train.warmup_ratio": 0.1,
        "train.max_grad_norm": 1.0,
        "train.optim": "adamw_torch_fused",
        "train.logging_steps": 10,
        "train.eval_steps": 500,
        "train.report_to": (),
        "output_dir": "saves/desk",
    }


@pytest.mark.parametrize("path", [TICKETS, CLUSTER, DESK], ids=lambda path: path.stem)
def test_no_key_passes_in_silence(path: Path) -> None:
    translation = translate_file(path)
    lines = path.read_text().splitlines()
    said = {one.key.partition(".")[0] for one in translation.said if one.line}
    assert said == set(yaml.safe_load(path.read_text()))
    for one, text in zip(translation.said, translation.report(), strict=True):
        assert one.key in text
        if one.line:
            assert text.startswith(f"{path}:{one.line}: {one.key}")
            assert lines[one.line - 1].strip().startswith(one.key.rpartition(".")[2] + ":")


@pytest.mark.parametrize("path", [TICKETS, DESK], ids=lambda path: path.stem)
def test_yaml_says_what_was_translated(path: Path, tmp_path: Path) -> None:
    translation = translate_file(path)
    text = translation.to_yaml()
    if path == DESK:
        assert "# Left out: dataset, line 15: NOT SUPPORTED: DATA/dataset_info.json" in text
        text = text.replace("data:\n", "data:\n  train: '?'\n")
    assert load_config(write(tmp_path / "run.yaml", text)) == translation.make_config()
    assert f"# Translated from {path.name} ({translation.trainer})." in text
    if path == TICKETS:
        assert "  rank: 24  # lora_r, line 14\n" in text
        assert "  modules_to_save: [lm_head]  # lora_modules_to_save, line 18\n" in text


def test_what_is_not_supported_says_why() -> None:
    reasons = {one.key: one.outcome.reason for one in translate_file(CLUSTER).unsupported}
    assert set(reasons) == {
        *("load_in_8bit", "datasets", "deepspeed", "rl", "early_stopping_patience", "made_up_key"),
    }
    assert "alpaca_w_system.load_open_orca' is a prompt style of Axolotl's" in reasons["datasets"]
    assert reasons["made_up_key"] == "not known here"


@pytest.mark.parametrize(
    ("line", "values"),
    [
        ("fp16: true", {"model.dtype": "float16"}),
        ("tokens: [<a>, <b>]", {"model.added_tokens": ("<a>", "<b>")}),
        ("special_tokens: {additional_special_tokens: [<c>]}", {"model.added_tokens": ("<c>",)}),
        ("bf16: false", {"model.dtype": "float32"}),
        ("bf16: auto\nfp16: true", {"model.dtype": "float16"}),
        ("batch_size: 32\nmicro_batch_size: 4", {"train.gradient_accumulation_steps": 8}),
        ("gpu_memory_limit: 20", {"memory.gpu": "20GiB"}),
        ("lora_target_modules: q_proj|v_proj", {"lora.targets": "q_proj|v_proj"}),
        ("train_on_inputs: true", {"data.train_on": "all"}),
        ("activation_offloading: true\ngradient_checkpointing: true", {"train.gradient_checkpointing": "offload"}),
        ("use_tensorboard: true\nwandb_project: p", {"train.report_to": ("tensorboard", "wandb")}),
        ("optimizer: paged_adamw", {"train.optim": "paged_adamw_32bit"}),
        ("lora_model_dir: old", {"lora.adapter": "old"}),
        ("chat_template: jinja\nchat_template_jinja: '{{ 1 }}'", {"data.chat_template": "{{ 1 }}"}),
    ],
)
def test_axolotl_keys(line: str, values: dict[str, Any], tmp_path: Path) -> None:
    translation = translate_file(write(tmp_path / "a.yml", f"{LEAST}{DATA}{line}\n"))
    assert translation.unsupported == []
    assert {name: translation.values[name] for name in values} == values
    translation.make_config()


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("{path: d, type: alpaca}", {"data.train": "d", "data.format": "alpaca"}),
        ("{path: d, name: c, split: test, type: sharegpt}", {"data.train": "d:c", "data.split": "test"}),
        ("{path: d, type: completion, field: body}", {"data.format": "text", "data.columns": {"text": "body"}}),
        (
            "{path: d, type: {field_instruction: q, field_output: a, system_prompt: Be kind.}}",
            {"data.columns": {"prompt": "q", "completion": "a"}, "data.system": "Be kind."},
        ),
        ("{path: d, type: sharegpt, conversation: chatml}", {"data.chat_template": "chatml"}),
        ("{path: d, type: chat_template, message_field_role: r}", {"data.columns": {"role": "r"}}),
    ],
)
def test_axolotl_data_sets(entry: str, values: dict[str, Any], tmp_path: Path) -> None:
    translation = translate_file(write(tmp_path / "a.yml", f"{LEAST}datasets: [{entry}]\n"))
    assert translation.unsupported == []
    assert {name: translation.values[name] for name in values} == values


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("datasets: [{path: a, type: alpaca}, {path: b, type: alpaca}]", "2 data sets"),
        ("datasets: [{path: 's3://a', type: alpaca}]", "must be fetched first"),
        (
            "datasets: [{path: a, type: {format: 'Q: {instruction}'}}]",
            "type: format: prompts are written",
        ),
        (
            "datasets: [{path: a, type: chat_template, train_on_eos: last}]",
            "train_on_eos: the end of each",
        ),
        ("datasets: [{path: a, type: chat_template, colour: red}]", "colour: no key of a data set"),
        (DATA + "test_datasets: [{path: b, type: alpaca}]", "laid out like those of training"),
        (DATA + "eval_steps: 0.05", "a share of the steps"),
        (DATA + "optimizer: muon", "'muon': there are adamw_torch"),
        (DATA + "lr_scheduler: rex", "'rex'; there are linear"),
        (DATA + "val_set_size: 200", "a number of examples"),
        (DATA + "plugins: [my.Plugin]", "plugins are not loaded: my.Plugin"),
        (DATA + "lora_target_linear: true\nlora_target_modules: [lm_head]", "all linear layers and lm_head"),
        (DATA + "gradient_checkpointing: offload_disk", "put away into host memory at most"),
        (DATA + "peft_init_lora_weights: gaussian", "adapters begin as zero, loftq, pissa"),
    ],
)
def test_axolotl_refusals(lines: str, reason: str, tmp_path: Path) -> None:
    translation = translate_file(write(tmp_path / "a.yml", f"{LEAST}{lines}\n"))
    assert len(translation.unsupported) == 1
    assert reason in "\n".join(translation.report())


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        ("peft_use_dora: true", {"lora.dora": True}),
        ("peft_init_lora_weights: pissa_niter_4", {"lora.init": "pissa_niter_4"}),
        ("peft_init_lora_weights: loftq", {"lora.init": "loftq"}),
    ],
)
def test_axolotl_variants_of_lora(lines: str, values: dict[str, Any], tmp_path: Path) -> None:
    translation = translate_file(write(tmp_path / "a.yml", f"{LEAST}{DATA}{lines}\n"))
    assert translation.unsupported == []
    assert values.items() <= translation.values.items()


def test_what_is_left_to_the_person_is_said(tmp_path: Path) -> None:
    text = f"{LEAST}{DATA}special_tokens:\n  eos_token: </s>\nchat_template: llama3\nevals_per_epoch: 4\n"
    translation = translate_file(write(tmp_path / "a.yml", text))
    assert translation.unsupported == []
    report = "\n".join(translation.report())
    assert "a.yml:9: special_tokens.eos_token -> as it is here; but: the tokenizer's own eos_token is used" in report
    assert "make sure that it is '</s>'" in report
    assert "the model's own template is used, Axolotl's llama3 may differ" in report
    assert "a.yml:11: evals_per_epoch -> as it is here; but: at the end of each epoch" in report


def test_full_fine_tuning_is_not_supported(tmp_path: Path) -> None:
    text = (LEAST + DATA).replace("adapter: qlora\nload_in_4bit: true\n", "")
    (refused,) = translate_file(write(tmp_path / "a.yml", text)).unsupported
    assert (refused.key, refused.line) == ("adapter", None)
    assert "all weights are trained" in refused.outcome.reason


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "a.yml:1: not YAML"),
        ("- a", "no options in it; expected keys of another trainer"),
        ("model:\n  path: m", "no keys of Axolotl or LLaMA-Factory; see --from"),
        (LEAST, "datasets is not set, and no run goes without it"),
        (LEAST + DATA + "seed: often", "a.yml:8: 'often' is no whole number"),
        (LEAST + DATA + "sample_packing: maybe", "a.yml:8: 'maybe' is neither true nor false"),
        (LEAST + DATA + "seed: 1\nseed: 2", "a.yml:9: seed is given twice"),
        (LEAST.replace("load_in_4bit: true\n", "") + DATA, "adapter is qlora, but load_in_4bit is not true"),
        (LEAST + "datasets: [{path: a}]", "a.yml:7: a data set needs a type"),
    ],
)
def test_mistakes_are_told_with_their_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        translate_file(write(tmp_path / "a.yml", text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        ("dataset: talk", {"data.format": "sharegpt", "data.columns": {"messages": "log", "user": "human"}}),
        ("dataset: far", {"data.train": "acme/far:small", "data.split": "test", "data.format": "alpaca"}),
        ("quantization_bit: 4\ndouble_quantization: false", {"quant.double_quant": False}),
        ("lora_target: all\nlora_alpha: 7", {"lora.targets": "all-linear", "lora.alpha": 7}),
        ("packing: true", {"data.packing": True}),
        ("neat_packing: true\npacking: false", {"data.packing": True}),
        ("additional_target: embed_tokens,lm_head", {"lora.modules_to_save": ("embed_tokens", "lm_head")}),
    ],
)
def test_llama_factory_keys(lines: str, values: dict[str, Any], tmp_path: Path) -> None:
    explained = {
        "talk": {
            "file_name": "talk.json",
            "formatting": "sharegpt",
            "columns": {"messages": "log"},
            "tags": {"user_tag": "human"},
        },
        "far": {"hf_hub_url": "acme/far", "subset": "small", "split": "test"},
    }
    write(tmp_path / "dataset_info.json", json.dumps(explained))
    text = f"{LEAST_OF_FACTORY}dataset_dir: {tmp_path}\n{lines}\n"
    translation = translate_file(write(tmp_path / "a.yml", text))
    assert translation.unsupported == []
    assert {name: translation.values[name] for name in values} == values


def test_every_rule_gives_options_that_there_are() -> None:
    assert set(KINDS) == {"axolotl", "llama-factory"}
    for trainer in KINDS.values():
        assert trainer.defaults.keys() <= trainer.rules.keys()
        assert set(trainer.required) <= trainer.rules.keys()
    outcomes = [one.outcome for path in (TICKETS, CLUSTER, DESK) for one in translate_file(path).said]
    assert {type(outcome) for outcome in outcomes} == {Taken, Unneeded, Unsupported}
