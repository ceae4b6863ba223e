"""What stands between the gradients and the optimizer: clipping, loss scaling, and stopping at a bad batch.

    norm = |g| / scale      coefficient = min(1, max_norm / (norm + 1e-6))      g is divided by scale / coefficient

Everything is computed on the device and handed to the optimizer as tensors (`grad_scale`, `found_inf`, the protocol of
torch's own gradient scaler), so that a step never waits. A step whose loss or gradient is not finite changes nothing:
the optimizer skips it by that flag, and every later step too, unless bad steps are to be skipped alone. The host learns
of it one step late, from pinned memory, and hands it to `bad_steps`. On a CPU nothing is late: the loss is looked at
before its backward.

With `loss_spike` a step is bad as well where its loss is above loss_spike * mean, an exponential mean of the losses of
good steps (weight 0.02 for the newest), from the 20th on.

fp16 needs more. Its gradients of activations underflow, so the loss is multiplied by a scale that is halved when a
gradient overflows (that step alone is skipped) and doubled after 2000 steps without. An infinite loss is no matter of
scale and stops the run as well.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from halfbyte.distributed import ALONE, World
from halfbyte.train.bad_steps import BadStep, BadSteps, SeenBatch

EPSILON = 1e-6
INITIAL_SCALE = 2.0**14
SMALLEST_SCALE = 1.0
GROWTH_STEPS = 2000
NEWEST_WEIGHT = 0.02
STEPS_BEFORE_SPIKES = 20


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
        add_up: Makes the parameters' gradients the sums of all ranks'; a rank alone needs none.
        bad_steps: What to do with them.
        loss_spike: How many times the mean a loss is too much; None for never.
        device: Where losses are; unless given, where the first parameter is.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        max_norm: float,
        scaler: LossScaler | None = None,
        world: World = ALONE,
        add_up: Callable[[], None] | None = None,
        bad_steps: BadSteps | None = None,
        loss_spike: float | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.optimizer, self.scaler, self.world, self.add_up = optimizer, scaler, world, add_up
        assert add_up is not None or world.size == 1, "the gradients of several ranks are to be added up"
        self.bad_steps, self.loss_spike = bad_steps or BadSteps(), loss_spike
        self.max_norm = max_norm or math.inf
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        device = device or self.parameters[0].device
        self.is_late = device.type == "cuda"
        self._skips_itself = bool(getattr(optimizer, "_step_supports_amp_scaling", False))
        self._stopped = torch.zeros((), dtype=torch.bool, device=device)
        self._mean_loss = torch.zeros((), device=device)
        self._num_good = torch.zeros((), device=device)
        self._batches: list[SeenBatch] = []
        self._pending: _Pending | None = None
        if self.is_late:
            self._flag = torch.zeros((), dtype=torch.bool, pin_memory=True)
            self._copied = torch.cuda.Event()

    def see_loss(
        self, loss: torch.Tensor, origins: Sequence[str], *, step: int, inputs: Mapping[str, Any] | None = None
    ) -> None:
        """Note the loss of a micro-batch of the step numbered `step`, where its examples came from, and what they are.

        Raises:
            DivergedError: It is not finite, on a CPU where this is the only rank, and bad steps are not skipped.
        """
        self._batches.append(SeenBatch(loss.detach(), origins, inputs))
        waits = self.is_late or self.bad_steps.skips or self.world.size > 1
        if not waits and not math.isfinite(loss.item()):
            self.bad_steps.take(BadStep(step, self._batches, loss.item()))

    def restart_step(self) -> None:
        """Forget the micro-batches that were seen since the last step: they come again."""
        self._batches = []

    def loss_to_log(self, loss: torch.Tensor, *, num_micro_batches: int) -> torch.Tensor:
        """Return the loss of a micro-batch, or its share of the mean so far where it is not finite and is skipped."""
        share = self._mean_loss / (num_micro_batches * self.world.size)
        return torch.where(loss.isfinite(), loss, share) if self.bad_steps.skips else loss

    @torch.no_grad()
    def close_step(self, step: int) -> torch.Tensor:
        """Add up the ranks' gradients, prepare the optimizer for its step, and return their norm before clipping.

        Raises:
            DivergedError: The step is bad, on a CPU; the last step was bad, on a GPU.
        """
        # First, since ranks have begun it; whether the last step was bad, all of them learn from the same sums.
        if self.add_up is not None:
            self.add_up()
        self.finish()
        grads = [p.grad for p in self.parameters if p.grad is not None]
        scale = torch.ones((), device=self._stopped.device) if self.scaler is None else self.scaler.scale
        norm = torch.nn.utils.get_total_norm(grads).to(scale.device) / scale
        batches, self._batches = self._batches, []
        loss = torch.stack([batch.loss for batch in batches]).sum()
        self.world.add_([loss])
        overflow = ~norm.isfinite()
        bad = overflow | ~loss.isfinite()
        if self.scaler is not None:
            bad = ~loss.isfinite() | (overflow & (scale <= SMALLEST_SCALE))
            self.scaler.update(overflow)
        limit = None
        if self.loss_spike is not None:
            limit = self._mean_loss * self.loss_spike
            bad = bad | ((self._num_good >= STEPS_BEFORE_SPIKES) & (loss > limit))
        self._count(loss, is_good=~bad & ~overflow)
        if not self.bad_steps.skips:
            self._stopped |= bad
            bad = self._stopped
        pending = _Pending(step, batches, loss, limit)
        if not self.is_late and bad:
            self._take(pending)
        divisor = scale / (self.max_norm / (norm + EPSILON)).clamp(max=1.0)
        self._hand_over(grads, divisor, skip=bad | overflow)
        if self.is_late:
            self._flag.copy_(bad, non_blocking=True)
            self._copied.record()
            self._pending = pending
        return norm

    def finish(self) -> None:
        """Look at the last step's flag.

        Raises:
            DivergedError: That step was bad, and bad steps are not skipped.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        # The flag was copied a whole step ago: this waits for nothing but a device more than a step behind.
        self._copied.synchronize()
        if self._flag:
            self._take(pending)

    def state_dict(self) -> dict[str, float]:
        """Return the running mean of losses, and of how many steps it is."""
        return {"mean_loss": self._mean_loss.item(), "num_good": self._num_good.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self._mean_loss.fill_(state["mean_loss"])
        self._num_good.fill_(state["num_good"])

    def _count(self, loss: torch.Tensor, *, is_good: torch.Tensor) -> None:
        weight = torch.where(self._num_good == 0, 1.0, NEWEST_WEIGHT)
        mean = self._mean_loss + weight * (loss.to(self._mean_loss) - self._mean_loss)
        self._mean_loss = torch.where(is_good, mean, self._mean_loss)
        self._num_good = self._num_good + is_good

    def _take(self, pending: _Pending) -> None:
        limit = None if pending.limit is None else float(pending.limit)
        self.bad_steps.take(BadStep(pending.step, pending.batches, float(pending.loss), limit))

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
        for device in {grad.device for grad in grads}:
            torch._foreach_div_([grad for grad in grads if grad.device == device], divisor.to(device))


@dataclasses.dataclass(frozen=True, slots=True)
class _Pending:
    """A step of which the host does not know yet whether it was good."""

    step: int
    batches: list[SeenBatch]
    loss: torch.Tensor
    """Of all ranks."""
    limit: torch.Tensor | None
