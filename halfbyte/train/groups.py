"""What the optimizer treats alike."""

from __future__ import annotations

from typing import Any

from torch import nn

from halfbyte.nn import iter_trainable


def parameter_groups(model: nn.Module, *, lr: float, loraplus_lr_ratio: float = 1.0) -> list[dict[str, Any]]:
    """Return the trained parameters in groups: matrices decay, vectors do not, and lora_B may learn faster.

    With LoRA+ lora_B learns `loraplus_lr_ratio` times as fast as lora_A: one rate for both is too low for it, the more
    so the wider the model is (arXiv 2402.12354).

    Args:
        model: What is trained.
        lr: Learning rate of everything but lora_B.
        loraplus_lr_ratio: That of lora_B over it.
    """
    named = list(iter_trainable(model))
    faster = [p for name, p in named if loraplus_lr_ratio != 1.0 and name.endswith("lora_B")]
    rest = [p for _, p in named if not any(p is other for other in faster)]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2]},
        {"params": faster, "lr": lr * loraplus_lr_ratio},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
