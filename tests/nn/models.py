"""Tiny random models, and the usual stack's adapters on them."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from halfbyte.nn import quantize_linears_
from halfbyte.quant import QuantSpec

WORDS = 96


def tiny_llama(*, tied: bool = False, **changes: Any) -> LlamaForCausalLM:
    """Build a random Llama of two layers, always the same one."""
    torch.manual_seed(11)
    sizes: dict[str, Any] = {
        "vocab_size": WORDS,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": tied,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def tiny_quantized_llama(**changes: Any) -> LlamaForCausalLM:
    model = tiny_llama(**changes)
    quantize_linears_(model, QuantSpec())
    return model


def tiny_gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=2, n_positions=32))


def peft_model(model: torch.nn.Module, **config: Any) -> peft.PeftModel:
    with warnings.catch_warnings():
        # peft 0.21.2 asks transformers 5.23 for a property under its former name.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`", category=UserWarning)
        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))


def peft_adapters(model: torch.nn.Module, **config: Any) -> dict[str, tuple[int, float]]:
    """Let PEFT attach its adapters; return rank and scaling by path."""
    wrapped = peft_model(model, **config)
    return {
        path: (module.r["default"], module.scaling["default"])
        for path, module in wrapped.base_model.model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def make_tokens(rows: int = 2, length: int = 12, *, seed: int = 3) -> torch.Tensor:
    return torch.randint(0, WORDS, (rows, length), generator=torch.Generator().manual_seed(seed))
