"""One real training step on this machine: a tiny random Llama in 4 bits, through the trainer of every run.

It runs in a process of its own (`python -m halfbyte.cli.trial_step`), so that a crash in a driver or a compiler is a
finding of the doctor's and not its end. The child prints one JSON object; what it says when it fails is kept.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import BackendError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from halfbyte.data import TokenizedExample

COMMAND = (sys.executable, "-m", "halfbyte.cli.trial_step")
TIMEOUT_SECONDS = 300
VOCABULARY, ROW_TOKENS, NUM_EXAMPLES = 128, 32, 4
SHOWN_LINES = 20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrialStep:
    """What came of the step."""

    works: bool
    seconds: float
    """With the start of Python and the import of torch."""
    text: str
    """What it did; or the last lines of what it said when it failed."""


def try_step() -> TrialStep:
    """Train one step in a process of its own."""
    started = time.perf_counter()
    try:
        done = subprocess.run(COMMAND, capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return TrialStep(works=False, seconds=TIMEOUT_SECONDS, text=f"no end after {TIMEOUT_SECONDS} seconds")
    seconds = time.perf_counter() - started
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
        return TrialStep(works=True, seconds=seconds, text=_describe(found))
    said = "\n".join(done.stderr.strip().splitlines()[-SHOWN_LINES:])
    how = f"killed by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    return TrialStep(works=False, seconds=seconds, text=f"{how}\n{said}".strip())


def main() -> None:
    """Train the step in this process and print what it did as JSON."""
    from halfbyte.cli.console import quiet_libraries

    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train_one_step(Path(folder))))


def train_one_step(folder: Path) -> dict[str, Any]:
    """Train a tiny model for one step and return what happened.

    Args:
        folder: Where the trainer may write.

    Raises:
        BackendError: The loss is not finite, or an adapter has not changed.
    """
    import torch

    from halfbyte.device import default_device
    from halfbyte.nn import LoraSpec, iter_trainable
    from halfbyte.train import HalfbyteArguments, HalfbyteTrainer, TrainerOptions

    device = default_device()
    spec = LoraSpec(rank=4, alpha=8)
    model = build_tiny_model(device, spec)
    before = {name: parameter.detach().clone() for name, parameter in iter_trainable(model)}
    arguments = HalfbyteArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        optim="adamw_8bit",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )
    trainer = HalfbyteTrainer(
        model,
        arguments,
        train_dataset=build_examples(),
        options=TrainerOptions(row_tokens=ROW_TOKENS, base_model="tiny", lora=spec),
    )
    loss = float(trainer.train().training_loss)
    # The first step moves lora_B alone: lora_A has no gradient while that is zero.
    moved = all(not torch.equal(p, before[name]) for name, p in iter_trainable(model) if name.endswith("lora_B"))
    if not math.isfinite(loss) or not moved:
        raise BackendError(f"the step computes nonsense: loss {loss}, adapters {'moved' if moved else 'did not move'}")
    return {"device": str(device), "loss": loss, "notes": trainer.notes}


def build_tiny_model(device: torch.device, spec: Any) -> PreTrainedModel:
    """Return a random Llama of two layers in 4 bits, with adapters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from halfbyte.device import default_compute_dtype
    from halfbyte.models.attention import register_packed_attention
    from halfbyte.nn import attach_adapters, quantize_linears_
    from halfbyte.quant import QuantSpec

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=default_compute_dtype(device)).to(device)
    model.set_attn_implementation(register_packed_attention())
    quantize_linears_(model, QuantSpec())
    attach_adapters(model, spec)
    return model


def build_examples() -> list[TokenizedExample]:
    """Return random examples, the second half of each to be learned."""
    import numpy as np

    from halfbyte.data import TokenizedExample

    generator = np.random.default_rng(0)
    is_learned = np.arange(ROW_TOKENS) >= ROW_TOKENS // 2
    return [
        TokenizedExample(generator.integers(3, VOCABULARY, ROW_TOKENS, dtype=np.int32), is_learned, f"random:{number}")
        for number in range(NUM_EXAMPLES)
    ]


def _describe(found: dict[str, Any]) -> str:
    return "\n".join([f"on {found['device']}: loss {found['loss']:.3f}, all adapters updated", *found["notes"]])


if __name__ == "__main__":
    main()
