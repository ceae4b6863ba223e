"""Axolotl's keys. Datasets are in `axolotl_data`.

Left-out keys that decide a run have Axolotl's defaults: one epoch where ours are three, no dropout, no packing,
gradients scaled down to a norm of 1 (transformers' default), examples that are too long dropped.
"""

from __future__ import annotations

from typing import Any

from halfbyte.config.adapter_init import LOFTQ, PISSA, ZERO
from halfbyte.config.foreign.axolotl_data import DATA_RULES
from halfbyte.config.foreign.rules import (
    BASE_IS_WHOLE,
    EPOCH_ENDS,
    UPLOAD,
    choice,
    differs,
    dtype,
    every,
    flag,
    literal,
    names,
    number,
    only,
    option,
    same_as,
    strategy,
    switch,
    unneeded,
    unsupported,
    whole,
)
from halfbyte.config.foreign.translation import Document, Outcome, Rule, Taken, Trainer, Unneeded, Unsupported
from halfbyte.config.lora import ALL_LINEAR
from halfbyte.errors import ConfigError

_OPTIMIZERS = {
    **{name: name for name in ("adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "adamw_8bit")},
    **{name: name for name in ("paged_adamw_8bit", "paged_adamw_32bit")},
    "paged_adamw": "paged_adamw_32bit",
    "adamw_hf": "adamw_torch",
}
_FROM_MODEL = "read from the model's own files"
_ATTENTION = "attention that keeps packed examples apart is chosen by the device; the result is the same"
_FASTER = "only speed and memory; fused blocks and the chunked loss are taken where they fit"
_SUPERVISED = "supervised fine-tuning only"
_HARMLESS_PLUGINS = ("liger", "cut_cross_entropy")


def _adapter(value: Any, document: Document) -> Outcome:
    if value is None:
        return Unsupported("without one all weights are trained; here adapters are, and lora.modules_to_save")
    if value not in ("lora", "qlora"):
        return Unsupported(f"adapters are LoRA, not {value!r}")
    if value == "qlora" and not document.get("load_in_4bit"):
        raise ConfigError("adapter is qlora, but load_in_4bit is not true; Axolotl refuses that too")
    return Taken({})


def _targets(value: Any, document: Document) -> Outcome:
    if document.get("lora_target_linear"):
        heads = [name for name in names(value) if name in ("lm_head", "embed_tokens")]
        if heads:
            return Unsupported(f"all linear layers and {', '.join(heads)}: write them all into lora.targets")
        return Unneeded("lora_target_linear includes them")
    return Taken({"lora.targets": value if isinstance(value, str) else names(value)})


def _all_linear(value: Any, document: Document) -> Outcome:
    return Taken({"lora.targets": ALL_LINEAR}) if flag(value) else Unneeded("switched off")


def _bf16(value: Any, document: Document) -> Outcome:
    if document.get("fp16") or document.get("float16"):
        return Unneeded("fp16 is set")
    if value == "auto":
        return Taken({"model.dtype": "auto"})
    return Taken({"model.dtype": "bfloat16" if value in (True, "full") else "float32"})


def _checkpointing(value: Any, document: Document) -> Outcome:
    if document.get("activation_offloading"):
        return Unneeded("activation_offloading says more")
    if value in (True, False, "offload"):
        note = "auto computes again only where activations would not fit, with the same result" if value is True else ""
        return Taken({"train.gradient_checkpointing": value}, note)
    return Unsupported(f"{value!r}: activations are put away into host memory at most (offload)")


def _scheduler(value: Any, document: Document) -> Outcome:
    lowest = document.get("cosine_min_lr_ratio")
    if lowest is not None and value == "cosine":
        return Unneeded("cosine_min_lr_ratio says more")
    return literal("train.lr_scheduler_type")(value, document)


def _lowest_rate(value: Any, document: Document) -> Outcome:
    if document.get("lr_scheduler") not in (None, "cosine"):
        return Unsupported("for the scheduler cosine only")
    return Taken({"train.lr_scheduler_type": "cosine_with_min_lr", "train.lr_scheduler_kwargs": {"min_lr_rate": value}})


def _batch_size(value: Any, document: Document) -> Outcome:
    micro = document.get("micro_batch_size")
    if micro and document.get("gradient_accumulation_steps"):
        return Unneeded("micro_batch_size and gradient_accumulation_steps say it")
    if not micro:
        return Unsupported("say micro_batch_size too")
    if value % micro:
        return Unsupported(f"no multiple of micro_batch_size, {micro}")
    return Taken({"train.gradient_accumulation_steps": value // micro})


def _memory_limit(value: Any, document: Document) -> Outcome:
    return Taken({"memory.gpu": value if isinstance(value, str) else f"{value}GiB"})


def _plugins(value: Any, document: Document) -> Outcome:
    others = [name for name in names(value) if not any(word in name for word in _HARMLESS_PLUGINS)]
    return Unsupported(f"plugins are not loaded: {', '.join(others)}") if others else Unneeded(_FASTER)


def _group_by_length(value: Any, document: Document) -> Outcome:
    if document.get("sample_packing"):
        return Unneeded("packed rows are all of one length")
    return Taken({"train.group_by_length": flag(value)})


def _logger(name: str, variable: str) -> Rule:
    return lambda value, document: Taken({"train.report_to": (name,)}, f"set {variable}={value} in the environment")


def _init(value: Any, document: Document) -> Outcome:
    if value is True:
        return Taken({})
    if value == LOFTQ or PISSA.fullmatch(str(value)):
        return Taken({"lora.init": value})
    return Unsupported(f"adapters begin as {ZERO}, {LOFTQ}, pissa or pissa_niter_N")


_RULES: dict[str, Rule] = {
    # model
    "base_model": option("model.path"),
    "revision_of_model": option("model.revision"),
    "base_model_config": same_as("base_model", "the configuration comes from the model's folder"),
    "tokenizer_config": same_as("base_model", "the tokenizer comes from the model's folder"),
    **dict.fromkeys(("model_type", "tokenizer_type", "processor_type", "tokenizer_use_fast"), unneeded(_FROM_MODEL)),
    "tokenizer_legacy": unneeded(_FROM_MODEL),
    "tokenizer_use_mistral_common": unsupported("tokenizers are transformers' own"),
    "scaling_softmax": unsupported("attention is computed as the model says"),
    "trust_remote_code": unsupported("no code of a model runs here"),
    "load_in_4bit": switch("quant.enabled"),
    "load_in_8bit": unsupported("weights are held in 4 bits or in 16; set load_in_4bit, or neither"),
    "gptq": unsupported("GPTQ's weights are not read; start from the unquantised model"),
    "bnb_config_kwargs.bnb_4bit_quant_type": option("quant.codebook"),
    "bnb_config_kwargs.bnb_4bit_use_double_quant": switch("quant.double_quant"),
    "overrides_of_model_config": unsupported("edit the model's config.json"),
    "resize_token_embeddings_to_32x": unneeded("no tokens are added"),
    "embeddings_skip_upcast": unneeded("embeddings stay in 16 bits"),
    "low_cpu_mem_usage": unneeded("weights are quantised as they are read, whatever the memory"),
    # adapters
    "adapter": _adapter,
    "lora_r": whole("lora.rank"),
    "lora_alpha": number("lora.alpha"),
    "lora_dropout": number("lora.dropout"),
    "lora_target_modules": _targets,
    "lora_target_linear": _all_linear,
    "lora_target_parameters": unsupported("adapters are for linear layers"),
    "lora_modules_to_save": option("lora.modules_to_save"),
    "lora_model_dir": option("lora.adapter"),
    "lora_fan_in_fan_out": unsupported("for GPT-2's layers, which get no adapters"),
    "lora_on_cpu": unneeded("adapters are merged tensor by tensor"),
    "peft_use_dora": switch("lora.dora"),
    "peft_use_rslora": switch("lora.rslora"),
    "peft_layers_to_transform": option("lora.layers_to_transform"),
    "peft_layers_pattern": option("lora.layers_pattern"),
    "peft_layer_replication": unsupported("layers are not replicated"),
    "peft_init_lora_weights": _init,
    "peft": unsupported("bitsandbytes' 4 bits only, and LoftQ is peft_init_lora_weights"),
    "loraplus_lr_ratio": number("train.loraplus_lr_ratio"),
    "loraplus_lr_embedding": unneeded("embeddings get no adapters"),
    # training
    "micro_batch_size": whole("train.per_device_train_batch_size"),
    "eval_batch_size": whole("train.per_device_eval_batch_size"),
    "gradient_accumulation_steps": whole("train.gradient_accumulation_steps"),
    "batch_size": _batch_size,
    "num_epochs": number("train.num_train_epochs"),
    "max_steps": whole("train.max_steps"),
    "learning_rate": number("train.learning_rate"),
    "lr_scheduler": _scheduler,
    "lr_scheduler_kwargs": option("train.lr_scheduler_kwargs"),
    "cosine_min_lr_ratio": _lowest_rate,
    "cosine_constant_lr_ratio": unsupported("there is no such scheduler"),
    "lr_quadratic_warmup": unsupported("the learning rate rises linearly"),
    "warmup_steps": whole("train.warmup_steps"),
    "warmup_ratio": number("train.warmup_ratio"),
    "weight_decay": number("train.weight_decay"),
    "max_grad_norm": number("train.max_grad_norm"),
    "optimizer": choice("train.optim", _OPTIMIZERS, others=f"there are {', '.join(_OPTIMIZERS)}"),
    "optim_args": unsupported("the optimizers have no further options"),
    "optim_target_modules": unsupported("the optimizers have no further options"),
    **{name: number(f"train.{name}") for name in ("adam_beta1", "adam_beta2", "adam_epsilon")},
    **dict.fromkeys(("neftune_noise_alpha", "noisy_embedding_alpha"), number("train.neftune_noise_alpha")),
    "seed": whole("train.seed"),
    "bf16": _bf16,
    "bfloat16": dtype("bfloat16"),
    **dict.fromkeys(("fp16", "float16"), dtype("float16")),
    "float32": dtype("float32"),
    "tf32": unneeded("products are in 16 bits, and float32 ones are exact"),
    "fp8": unsupported("Axolotl's fp8 is another; see train.fp8"),
    "gradient_checkpointing": _checkpointing,
    "gradient_checkpointing_kwargs": unneeded("how it is done changes nothing"),
    "activation_offloading": lambda value, document: (
        Taken({"train.gradient_checkpointing": "offload"}) if value else Unneeded("switched off")
    ),
    "group_by_length": _group_by_length,
    "auto_find_batch_size": unsupported("train.batch_size is divided by what fits"),
    "gpu_memory_limit": _memory_limit,
    "unfrozen_parameters": unsupported("adapters and lora.modules_to_save are trained, nothing else"),
    "curriculum_sampling": unsupported("examples are shuffled"),
    "early_stopping_patience": unsupported("a run ends when its steps are done"),
    "load_best_model_at_end": unsupported("the last adapter is kept; checkpoints lie beside it"),
    **dict.fromkeys(("metric_for_best_model", "greater_is_better"), unneeded("the last adapter is kept")),
    **dict.fromkeys(
        ("loss_watchdog_threshold", "loss_watchdog_patience"), unsupported("only a loss that is not finite stops a run")
    ),
    **dict.fromkeys(("rl", "reward_model", "process_reward_model", "trl", "vllm"), unsupported(_SUPERVISED)),
    **dict.fromkeys(("qat", "quantization"), unsupported("see halfbyte quantize and halfbyte export")),
    **dict.fromkeys(("embedding_lr", "embedding_lr_scale", "lr_groups"), unsupported("one learning rate, and LoRA+")),
    # attention and speed
    **dict.fromkeys(("flash_attention", "xformers_attention", "sdp_attention", "flex_attention"), unneeded(_ATTENTION)),
    **dict.fromkeys(("eager_attention", "attn_implementation", "attention"), unneeded(_ATTENTION)),
    "s2_attention": unsupported("shifted sparse attention computes something else"),
    "plugins": _plugins,
    # measuring, saving, logging
    "logging_steps": every("logging_steps"),
    "eval_steps": every("eval_steps"),
    "save_steps": every("save_steps"),
    "evals_per_epoch": differs(EPOCH_ENDS.format("eval_steps")),
    "saves_per_epoch": differs(EPOCH_ENDS.format("save_steps")),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), strategy("eval_steps")),
    "save_strategy": strategy("save_steps"),
    "save_total_limit": whole("train.save_total_limit"),
    "save_only_model": differs("checkpoints always hold what resuming needs"),
    "save_safetensors": only(True, "adapters are written as safetensors"),
    "save_first_step": unneeded("writing is tried before the first step"),
    "eval_sample_packing": unneeded("a held-out loss is the same packed or not: examples are kept apart"),
    "do_causal_lm_eval": unsupported("held-out loss and answers are what is measured"),
    "do_bench_eval": unsupported("held-out loss and answers are what is measured"),
    "eval_sequence_len": same_as("sequence_len", "held-out examples are as long as those of training"),
    "eval_table_size": unneeded("train.num_samples answers are shown before and after"),
    "eval_max_new_tokens": whole("train.max_sample_tokens"),
    "output_dir": option("output_dir"),
    "resume_from_checkpoint": unsupported("halfbyte train run.yaml --resume goes on from the last checkpoint"),
    "auto_resume_from_checkpoints": unsupported("halfbyte train run.yaml --resume goes on from the last checkpoint"),
    **dict.fromkeys(("hub_model_id", "hub_strategy", "hub_revision", "push_dataset_to_hub"), unsupported(UPLOAD)),
    "hf_use_auth_token": unneeded("HF_TOKEN in the environment says it"),
    "wandb_project": _logger("wandb", "WANDB_PROJECT"),
    "wandb_entity": differs("set WANDB_ENTITY={} in the environment"),
    "wandb_name": differs("set WANDB_NAME={} in the environment"),
    "wandb_run_id": differs("set WANDB_RUN_ID={} in the environment"),
    "wandb_mode": differs("set WANDB_MODE={} in the environment"),
    "wandb_watch": differs("set WANDB_WATCH={} in the environment"),
    "wandb_log_model": differs("set WANDB_LOG_MODEL={} in the environment"),
    "mlflow_tracking_uri": _logger("mlflow", "MLFLOW_TRACKING_URI"),
    "mlflow_experiment_name": _logger("mlflow", "MLFLOW_EXPERIMENT_NAME"),
    "comet_project_name": _logger("comet_ml", "COMET_PROJECT_NAME"),
    "use_tensorboard": lambda value, document: Taken({"train.report_to": ("tensorboard",)} if flag(value) else {}),
    # one process
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "fsdp_version", "tensor_parallel_size"), unsupported(BASE_IS_WHOLE)
    ),
    **dict.fromkeys(("context_parallel_size", "sequence_parallel_degree", "device_map"), unsupported(BASE_IS_WHOLE)),
    **dict.fromkeys(("local_rank", "world_size", "device"), unneeded(BASE_IS_WHOLE)),
    "max_memory": unsupported("memory.gpu and memory.host are limits"),
    # nothing to do with the result
    **dict.fromkeys(("strict", "debug", "gc_steps", "profiler_steps"), unneeded("for finding faults in Axolotl")),
    "include_tokens_per_second": unneeded("always told"),
    "merge_lora": unneeded("halfbyte merge does it"),
    "dataloader_num_workers": whole("train.dataloader_num_workers"),
    **DATA_RULES,
}
_FAMILIES: dict[str, Rule] = {
    "is_": unneeded(_FROM_MODEL),
    "ddp": unneeded(BASE_IS_WHOLE),
    "flash_attn_": unneeded(_FASTER),
    "unsloth_": unneeded(_FASTER),
    "liger_": unneeded(_FASTER),
    "cut_cross_entropy": unneeded(_FASTER),
    "torch_compile": unneeded(_FASTER),
    "bnb_config_kwargs.llm_int8": unneeded("for weights in 8 bits"),
    "bnb_config_kwargs.bnb_4bit_compute": unneeded("bf16 and fp16 say it"),
    "lora_mlp_kernel": unneeded(_FASTER),
    "lora_qkv_kernel": unneeded(_FASTER),
    "lora_o_kernel": unneeded(_FASTER),
    **dict.fromkeys(("dpo_", "kto_", "orpo_", "rpo_", "cpo_", "simpo_", "rl_"), unsupported(_SUPERVISED)),
    "relora": unsupported("adapters are not restarted"),
    "lisa_": unsupported("all adapters are trained in every step"),
    "dataloader_": unneeded("how batches reach the device changes nothing"),
    "dataset_": unneeded("examples are read and tokenised anew, in seconds"),
}
AXOLOTL = Trainer(
    name="Axolotl",
    rules=_RULES,
    families=_FAMILIES,
    defaults={
        "adapter": None,
        "load_in_4bit": False,
        "lora_dropout": 0.0,
        "num_epochs": 1,
        "micro_batch_size": 1,
        "max_grad_norm": 1.0,
        "optimizer": "adamw_torch_fused",
        "sequence_len": 512,
        "sample_packing": False,
        "excess_length_strategy": "drop",
        "val_set_size": 0.0,
    },
    required=("base_model", "datasets", "learning_rate", "lora_r", "lora_alpha"),
)
