"""LLaMA-Factory's keys: its own, and those of transformers' TrainingArguments, whose names ours mostly have too.

Data sets go by names that `dataset_info.json` explains, in the folder that dataset_dir names; it is read where it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from halfbyte.config.foreign.rules import (
    BASE_IS_WHOLE,
    UPLOAD,
    differs,
    dtype,
    every,
    flag,
    held_out_share,
    literal,
    names,
    number,
    only,
    option,
    strategy,
    switch,
    unneeded,
    unsupported,
    whole,
)
from halfbyte.config.foreign.translation import Document, Outcome, Rule, Taken, Trainer, Unsupported
from halfbyte.config.lora import ALL_LINEAR
from halfbyte.errors import ConfigError, FormatError

_FASTER = "only speed and memory"
_READING = "examples are read and tokenised anew, in seconds"
# Columns of dataset_info.json, by its names and ours.
_PAIR_COLUMNS = {"prompt": "prompt", "query": "input", "response": "completion", "system": "system"}
_TURN_TAGS = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
_TURN_TAGS |= {"system_tag": "system"}


def _dataset(name: str) -> Rule:
    def rule(value: Any, document: Document) -> Outcome:
        wanted = [part.strip() for text in names(value) for part in text.split(",")]
        if len(wanted) > 1:
            return Unsupported(f"{len(wanted)} data sets; put their examples into one folder, and name that")
        folder = Path(str(document.get("dataset_dir") or "data"))
        entry = _entry_of(folder, wanted[0])
        if entry is None:
            return Unsupported(
                f"{folder / 'dataset_info.json'} does not explain {wanted[0]!r}; name a file: data.train"
            )
        if "file_name" in entry:
            source = str(folder / entry["file_name"])
        elif "hf_hub_url" in entry:
            source = ":".join(str(entry[key]) for key in ("hf_hub_url", "subset") if entry.get(key))
        else:
            return Unsupported(f"{wanted[0]!r} comes from elsewhere than a file or the hub")
        layout = _layout(entry)
        if isinstance(layout, Unsupported) or name != "data.train":
            return layout if isinstance(layout, Unsupported) else Taken({name: source})
        return Taken({name: source, **layout.values})

    return rule


def _entry_of(folder: Path, name: str) -> dict[str, Any] | None:
    path = folder / "dataset_info.json"
    try:
        if not path.exists():
            return None
        explained = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no JSON: {error}") from None
    entry = explained.get(name) if isinstance(explained, dict) else None
    return entry if isinstance(entry, dict) else None


def _layout(entry: dict[str, Any]) -> Taken | Unsupported:
    columns, tags = entry.get("columns", {}), entry.get("tags", {})
    values: dict[str, Any] = {"data.split": entry["split"]} if entry.get("split") else {}
    unknown = [key for key in ("ranking", "script_url", "num_samples") if entry.get(key)]
    if unknown:
        return Unsupported(f"{unknown[0]} of a data set")
    if entry.get("formatting", "alpaca") == "alpaca":
        others = sorted(columns.keys() - _PAIR_COLUMNS.keys())
        if others:
            return Unsupported(f"the column {others[0]} of a data set")
        named = {_PAIR_COLUMNS[key]: column for key, column in columns.items()}
        layout = {"data.format": "prompt_completion", "data.columns": named} if named else {"data.format": "alpaca"}
        return Taken(values | layout)
    others = sorted([*(columns.keys() - {"messages", "system", "tools"}), *(tags.keys() - _TURN_TAGS.keys())])
    if others:
        return Unsupported(f"{others[0]} of a data set")
    named = {key: column for key, column in columns.items() if key == "messages"}
    named |= {_TURN_TAGS[key]: tag for key, tag in tags.items()}
    return Taken(values | {"data.format": "sharegpt"} | ({"data.columns": named} if named else {}))


def _quantization(value: Any, document: Document) -> Outcome:
    if value is None:
        return Taken({"quant.enabled": False})
    if value != 4:
        return Unsupported(f"weights are held in 4 bits or in 16, not in {value}")
    method = document.get("quantization_method") or "bnb"
    if method not in ("bnb", "bitsandbytes"):
        return Unsupported(f"4 bits are bitsandbytes', not {method}'s")
    return Taken({"quant.enabled": True})


def _targets(value: Any, document: Document) -> Outcome:
    listed = tuple(part.strip() for part in ",".join(names(value)).split(","))
    return Taken({"lora.targets": ALL_LINEAR if listed == ("all",) else listed})


def _alpha(value: Any, document: Document) -> Outcome:
    if value == "twice the rank":
        value = 2 * (document.get("lora_rank") or 8)
    return Taken({"lora.alpha": value})


def _pissa(value: Any, document: Document) -> Outcome:
    if not flag(value):
        return Taken({})
    rounds = document.get("pissa_iter")
    return Taken({"lora.init": "pissa" if rounds == -1 else f"pissa_niter_{16 if rounds is None else rounds}"})


def _packing(value: Any, document: Document) -> Outcome:
    if flag(value) and document.get("neat_packing") is not True:
        return Taken({"data.packing": True}, "examples in a row are kept apart, as with neat_packing")
    return Taken({"data.packing": flag(value) or document.get("neat_packing") is True})


def _reports(value: Any, document: Document) -> Outcome:
    return Taken({"train.report_to": tuple(name for name in names(value) if name != "none")})


_RULES: dict[str, Rule] = {
    "model_name_or_path": option("model.path"),
    "adapter_name_or_path": option("lora.adapter"),
    "model_revision": option("model.revision"),
    "trust_remote_code": only(False, "no code of a model runs here"),
    "quantization_bit": _quantization,
    "quantization_method": unneeded("quantization_bit says it"),
    "quantization_type": option("quant.codebook"),
    "double_quantization": switch("quant.double_quant"),
    "stage": only("sft", "supervised fine-tuning only"),
    "do_train": only(True, "halfbyte eval measures, halfbyte generate answers"),
    "do_eval": unneeded("data.held_out and data.held_out_fraction say it"),
    "do_predict": unsupported("halfbyte generate answers"),
    "finetuning_type": only("lora", "adapters are LoRA"),
    "lora_rank": whole("lora.rank"),
    "lora_alpha": _alpha,
    "lora_dropout": number("lora.dropout"),
    "lora_target": _targets,
    "additional_target": lambda value, document: Taken(
        {"lora.modules_to_save": tuple(part.strip() for part in ",".join(names(value)).split(","))}
    ),
    "use_rslora": switch("lora.rslora"),
    "use_dora": switch("lora.dora"),
    "pissa_init": _pissa,
    "pissa_iter": unneeded("pissa_init says it"),
    "pissa_convert": unneeded("adapters are written for the plain base in any case"),
    "create_new_adapter": unsupported("one adapter is trained"),
    "loraplus_lr_ratio": number("train.loraplus_lr_ratio"),
    "loraplus_lr_embedding": unneeded("embeddings get no adapters"),
    "dataset": _dataset("data.train"),
    "eval_dataset": _dataset("data.held_out"),
    "dataset_dir": unneeded("dataset says where the examples are"),
    "template": differs("the model's own template is used, LLaMA-Factory's {} may differ: see halfbyte data"),
    "default_system": option("data.system"),
    "enable_thinking": unsupported("what the model's template does"),
    "cutoff_len": whole("data.max_length"),
    "train_on_prompt": lambda value, document: Taken({"data.train_on": "all" if flag(value) else "assistant"}),
    "mask_history": unsupported("every turn of the assistant's is learned, or marked with weight: 0"),
    "max_samples": unsupported("all examples are read; write a shorter file"),
    "packing": _packing,
    "neat_packing": unneeded("packing says it: examples are always kept apart"),
    "val_size": held_out_share,
    "streaming": unsupported("data sets are read whole"),
    "per_device_train_batch_size": whole("train.per_device_train_batch_size"),
    "per_device_eval_batch_size": whole("train.per_device_eval_batch_size"),
    "gradient_accumulation_steps": whole("train.gradient_accumulation_steps"),
    "learning_rate": number("train.learning_rate"),
    "num_train_epochs": number("train.num_train_epochs"),
    "max_steps": whole("train.max_steps"),
    "lr_scheduler_type": literal("train.lr_scheduler_type"),
    "lr_scheduler_kwargs": option("train.lr_scheduler_kwargs"),
    "warmup_ratio": number("train.warmup_ratio"),
    "warmup_steps": whole("train.warmup_steps"),
    "weight_decay": number("train.weight_decay"),
    "max_grad_norm": number("train.max_grad_norm"),
    "optim": literal("train.optim"),
    **{name: number(f"train.{name}") for name in ("adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha")},
    "seed": whole("train.seed"),
    "group_by_length": switch("train.group_by_length"),
    **dict.fromkeys(("bf16", "pure_bf16"), dtype("bfloat16")),
    "fp16": dtype("float16"),
    "logging_steps": every("logging_steps"),
    "eval_steps": every("eval_steps"),
    "save_steps": every("save_steps"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), strategy("eval_steps")),
    "save_strategy": strategy("save_steps"),
    "save_total_limit": whole("train.save_total_limit"),
    "save_only_model": lambda value, document: Taken(
        {}, "checkpoints always hold what resuming needs" if flag(value) else ""
    ),
    "output_dir": option("output_dir"),
    "overwrite_output_dir": switch("train.overwrite"),
    "resume_from_checkpoint": unsupported("halfbyte train run.yaml --resume goes on from the last checkpoint"),
    "report_to": _reports,
    "run_name": differs("loggers take the output folder's name, not {}"),
    "plot_loss": unneeded("report.html has the curves"),
    "dataloader_num_workers": whole("train.dataloader_num_workers"),
    **dict.fromkeys(("overwrite_cache", "preprocessing_num_workers", "preprocessing_batch_size"), unneeded(_READING)),
    **dict.fromkeys(("flash_attn", "enable_liger_kernel", "use_unsloth", "tf32"), unneeded(_FASTER)),
    **dict.fromkeys(("disable_gradient_checkpointing", "low_cpu_mem_usage"), unneeded(_FASTER)),
    "gradient_checkpointing": option("train.gradient_checkpointing"),
    "shift_attn": unsupported("shifted sparse attention computes something else"),
    "rope_scaling": unsupported("edit the model's config.json"),
    "resize_vocab": unsupported("name the tokens in model.added_tokens"),
    **dict.fromkeys(("push_to_hub", "hub_model_id"), unsupported(UPLOAD)),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config"), unsupported(BASE_IS_WHOLE)),
}
LLAMA_FACTORY = Trainer(
    name="LLaMA-Factory",
    rules=_RULES,
    families={"ddp_": unneeded(BASE_IS_WHOLE)},
    defaults={
        "quantization_bit": None,
        "lora_rank": 8,
        "lora_alpha": "twice the rank",
        "lora_dropout": 0.0,
        "cutoff_len": 2048,
        "packing": False,
        "val_size": 0.0,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-5,
        "lr_scheduler_type": "linear",
        "warmup_ratio": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
    },
    required=("model_name_or_path",),
)
