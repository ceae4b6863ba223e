"""What stands between the gradients and the optimizer: clipping, loss scaling, and stopping at a bad batch.

    norm = |g| / scale      coefficient = min(1, max_norm / (norm + 1e-6))      g is divided by scale / coefficient

Everything is computed on the device and handed to the optimizer as tensors (`grad_scale`, `found_inf`, the protocol of
torch's own gradient scaler), so that a step never waits. A step whose loss or gradient is not finite changes nothing:
the optimizer skips it by that flag, and every later step too. The host learns of it one step late, from pinned
memory, and stops the run with the batch's examples by name. On a CPU nothing is late: the loss is looked at before its
backward.

fp16 needs more. Its gradients of activations underflow, so the loss is multiplied by a scale that is halved when a
gradient overflows (that step alone is skipped) and doubled after 2000 steps without. An infinite loss is no matter of
scale and stops the run as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from halfbyte.distributed import ALONE, World
from halfbyte.errors import HalfbyteError

NAMED_EXAMPLES = 12
EPSILON = 1e-6
INITIAL_SCALE = 2.0**14
SMALLEST_SCALE = 1.0
GROWTH_STEPS = 2000


class DivergedError(HalfbyteError):
    """A loss or gradient that is not finite."""


@dataclasses.dataclass(frozen=True, slots=True)
class _MicroBatch:
    loss: torch.Tensor
    origins: Sequence[str]


class LossScaler:
    """The factor of an fp16 loss, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL_SCALE, device=device)
        self.good_steps = torch.zeros((), device=device)

    def update(self, overflow: torch.Tensor) -> None:
        """Halve after an overflow, double after enough steps without one."""
        self.good_steps = torch.where(overflow, 0.0, self.good_steps + 1)
        grown = self.good_steps >= GROWTH_STEPS
        self.scale = torch.where(overflow, self.scale / 2, torch.where(grown, self.scale * 2, self.scale))
        self.good_steps = torch.where(grown, 0.0, self.good_steps)

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(state["good_steps"])


class StepGuard:
    """Watches the steps of one run.

    Args:
        optimizer: Honours grad_scale and found_inf if it says so; any other costs one wait for the device a step.
        max_norm: Gradients are scaled down to this norm; 0 for never.
        scaler: For fp16.
        world: Whose ranks have the other micro-batches of a step; they stop together.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float,
        scaler: LossScaler | None = None,
        world: World = ALONE,
    ) -> None:
        self.optimizer, self.scaler, self.world = optimizer, scaler, world
        self.max_norm = max_norm or math.inf
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = self.parameters[0].device
        self.is_late = device.type == "cuda"
        self._skips_itself = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._batches: list[_MicroBatch] = []
        self._pending: tuple[int, list[_MicroBatch]] | None = None
        if self.is_late:
            self._flag = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self._copied = torch.cuda.Event()

    def see_loss(self, loss: torch.Tensor, origins: Sequence[str], *, step: int) -> None:
        """Note the loss of a micro-batch of the step numbered `step`, and where its examples came from.

        Raises:
            DivergedError: It is not finite, on a CPU where this is the only rank.
        """
        self._batches.append(_MicroBatch(loss.detach(), origins))
        if not self.is_late and self.world.size == 1 and not math.isfinite(loss.item()):
            raise _diverged(step, self._batches, self.world)

    def restart_step(self) -> None:
        """Forget the micro-batches that were seen since the last step: they come again."""
        self._batches = []

    @torch.no_grad()
    def close_step(self, step: int) -> torch.Tensor:
        """Add up the ranks' gradients, prepare the optimizer for its step, and return their norm before clipping.

        Raises:
            DivergedError: The gradient is not finite, on a CPU; the last step was bad, on a GPU.
        """
        self.finish()
        if self.world.size > 1:
            self._add_up()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        scale = torch.ones((), device=self._stopped.device) if self.scaler is None else self.scaler.scale
        norm = torch.nn.utils.get_total_norm(grads) / scale
        batches, self._batches = self._batches, []
        overflow = ~norm.isfinite()
        bad = overflow
        if self.scaler is not None:
            infinite_losses = (~torch.stack([batch.loss for batch in batches]).isfinite()).sum()
            self.world.add_([infinite_losses])
            bad = (infinite_losses > 0) | (overflow & (scale <= SMALLEST_SCALE))
            self.scaler.update(overflow)
        self._stopped |= bad
        if not self.is_late and self._stopped:
            raise _diverged(step, batches, self.world)
        divisor = scale / (self.max_norm / (norm + EPSILON)).clamp(max=1.0)
        self._hand_over(grads, divisor, skip=self._stopped | overflow)
        if self.is_late:
            self._flag.copy_(self._stopped, non_blocking=True)
            self._copied.record()
            self._pending = step, batches
        return norm

    def finish(self) -> None:
        """Look at the last step's flag.

        Raises:
            DivergedError: That step was bad.
        """
        if self._pending is None:
            return
        step, batches = self._pending
        self._pending = None
        # The flag was copied a whole step ago: this waits for nothing but a device more than a step behind.
        self._copied.synchronize()
        if self._flag:
            raise _diverged(step, batches, self.world)

    def _add_up(self) -> None:
        """Give every rank the sums of all ranks' gradients."""
        for parameter in self.parameters:
            if parameter.grad is None:
                # A rank whose micro-batches trained nothing.
                parameter.grad = torch.zeros_like(parameter)
        self.world.add_([parameter.grad for parameter in self.parameters if parameter.grad is not None])

    def _hand_over(self, grads: list[torch.Tensor], divisor: torch.Tensor, *, skip: torch.Tensor) -> None:
        optimizer: Any = self.optimizer
        if self._skips_itself:
            optimizer.grad_scale, optimizer.found_inf = divisor, skip.float()
            return
        # This optimizer cannot skip by a flag, so the host has to know.
        if skip:
            for parameter in self.parameters:
                parameter.grad = None
            return
        torch._foreach_div_(grads, divisor)


def _diverged(step: int, batches: list[_MicroBatch], world: World) -> DivergedError:
    bad = [batch for batch in batches if not math.isfinite(batch.loss.item())]
    what = f"loss is {bad[0].loss.item()}" if bad else "gradient is not finite"
    origins = [origin for batch in bad or batches for origin in batch.origins]
    # Of all ranks, tell of the first whose loss was bad.
    _, what, origins = min(world.gather([not bad, what, origins]), key=lambda one: one[0])
    named = ", ".join(dict.fromkeys(origins[:NAMED_EXAMPLES])) or "unknown"
    more = f" and {len(origins) - NAMED_EXAMPLES} more" if len(origins) > NAMED_EXAMPLES else ""
    return DivergedError(
        f"step {step}: the {what}. The batch holds {named}{more}. Nothing of that step was applied. Look at these "
        "examples, or train with a lower learning_rate"
    )
