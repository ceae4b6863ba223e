"""A small training on GPUs, through fused blocks and graphs; see test_ranks_gpu.

torchrun --nproc-per-node=2 tests/distributed/train_gpu.py OUT.pt [--streamed | --sharded]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from halfbyte.device import default_device
from halfbyte.distributed import current_world, join_world
from halfbyte.memory.peer_memory import reach_each_other
from halfbyte.models.attention import PACKED_ATTENTION, register_packed_attention
from halfbyte.models.streaming import stream_blocks_
from halfbyte.nn import LoraSpec, attach_adapters, iter_trainable, quantize_linears_
from halfbyte.quant import QuantSpec
from halfbyte.train import HalfbyteArguments, HalfbyteTrainer, TrainerOptions
from tests.train.runs import build_examples, logged, trained_values

TURNS, ROW_TOKENS = 4, 32
CONFIG: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def build_model(device: torch.device) -> PreTrainedModel:
    """Return the same random model on every rank, in 4 bits, with adapters."""
    register_packed_attention()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**CONFIG), dtype=torch.bfloat16, attn_implementation=PACKED_ATTENTION
    ).to(device)
    quantize_linears_(model, QuantSpec())
    attach_adapters(model, LoraSpec(rank=16, dropout=0.1, seed=0))
    return model


def nudge(model: PreTrainedModel, seed: int) -> None:
    """Change each trained number by up to one part of 2^23 for each turn."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in iter_trainable(model):
            noise = torch.rand(parameter.shape, generator=generator).mul_(2).sub_(1).to(parameter.device)
            parameter.mul_(1 + noise * TURNS * torch.finfo(torch.float32).eps)


def train(*, streamed: bool = False, sharded: bool = False, nudged: int | None = None) -> dict[str, Any]:
    """Train, the turns of a step shared out over the ranks, and return what came out."""
    device, world = default_device(), current_world()
    model = build_model(device)
    if nudged is not None:
        nudge(model, nudged)
    if streamed or sharded:
        stream_blocks_(model, 2, device=device, num_slots=2, on_cards=sharded)
    with tempfile.TemporaryDirectory() as folder:
        trainer = HalfbyteTrainer(
            model,
            HalfbyteArguments(
                folder,
                num_train_epochs=2,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=TURNS // world.size,
                learning_rate=1e-3,
                optim="adamw_torch",
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=build_examples(75),
            options=TrainerOptions(row_tokens=ROW_TOKENS),
        )
        # So that some pieces of the gradients are on their way while others are computed.
        trainer.micro_batches.exchange.piece_bytes = 2**16
        trainer.train()
    return {
        "values": {name: value.cpu() for name, value in trained_values(model).items()},
        "loss": logged(trainer),
        "backend": world.backend,
        "device": str(torch.cuda.get_device_properties(device).uuid),
        "notes": trainer.notes,
        "pieces": len(trainer.micro_batches.exchange.pieces),
    }


def main() -> None:
    out, *flags = sys.argv[1:]
    with join_world() as world:
        result = train(streamed="--streamed" in flags, sharded="--sharded" in flags)
        result["reach"] = reach_each_other(world, default_device())
        result["devices"] = world.gather(result.pop("device"))
        if "--nudged" in flags:
            result["nudged"] = [train(nudged=seed)["loss"] for seed in range(3)]
        if world.is_main:
            torch.save(result, Path(out))


if __name__ == "__main__":
    main()
