"""AdamW over flat state: what `torch.optim.Optimizer` promises, around `halfbyte.ops.adamw8bit`.

Parameters of one device, dtype and state width form a cohort; a cohort has one slab of moments and is updated by one
launch on a GPU. Groups keep their own lr, betas, eps and weight decay inside a launch, so schedulers work as usual.

A step never waits for the device. It honours the two attributes that torch's gradient scaler sets on optimizers which
can skip by themselves, and which a training loop may set before any step:

    optimizer.grad_scale   one-element tensor on a device of the parameters; gradients are divided by it
    optimizer.found_inf    one-element tensor; where it is not zero the step changes nothing and does not count

State is made at the first step. `state_dict` holds plain numbers and tensors: for each parameter that has taken a
step its count and m and v, as codes and absmax or in fp32. Loading copies them into the slab, in whatever memory that
lives, so a paged optimizer stays paged and continues with the same bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch

from halfbyte.errors import ConfigError, FormatError
from halfbyte.memory.host_copy import TRANSFER_BYTES, copy_to_host
from halfbyte.memory.paged_state import PagedState
from halfbyte.ops.adamw8bit import (
    MIN_8BIT_NUMEL,
    AdamWOptions,
    AdamWState,
    StepControl,
    Stepper,
    build_stepper,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, slots=True)
class Cohort:
    """Parameters that share a slab, with their places in the order of all parameters."""

    indices: tuple[int, ...]
    params: tuple[torch.nn.Parameter, ...]
    state: AdamWState
    paged: PagedState | None
    stepper: Stepper


class FlatAdamW(torch.optim.Optimizer):
    """What the two widths share; use `AdamW8bit` or `AdamW32bit`."""

    min_8bit_numel: ClassVar[float]
    """Parameters with fewer elements keep their moments in fp32."""
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        paged: bool = False,
    ) -> None:
        self.paged = paged
        self._cohorts: list[Cohort] = []
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @property
    def state_bytes(self) -> int:
        """Bytes of the moments, 0 before the first step."""
        return sum(cohort.state.nbytes for cohort in self._cohorts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; the state of those already there is kept."""
        saved = self._export_state()
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group, len(self.param_groups) - 1)
        if self._cohorts:
            self._cohorts = self._build_cohorts()
            self._import_state(saved)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        if closure is not None:
            raise ConfigError(
                "AdamW takes no closure: compute the loss and its gradients, then call step() without arguments"
            )
        if not self._cohorts:
            self._cohorts = self._build_cohorts()
        groups = [_options_of(group) for group in self.param_groups]
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        for cohort in self._cohorts:
            device = cohort.params[0].device
            # Of a model on several cards, both are on one of them.
            control = StepControl(grad_scale=_on(device, grad_scale), found_inf=_on(device, found_inf))
            grads = [param.grad for param in cohort.params]
            cohort.stepper.step_(cohort.params, grads, groups=groups, control=control)

    def state_dict(self) -> dict[str, Any]:
        """Return the groups and, for each parameter that has taken a step, its state, as copies in host memory."""
        return {**copy_to_host({**super().state_dict(), "state": {}}), "state": self._export_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            FormatError: The state belongs to another optimizer or to other parameters.
        """
        try:
            super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        except (KeyError, ValueError) as error:
            raise FormatError(f"this optimizer state does not fit the parameters: {error}") from error
        self._cohorts = self._build_cohorts() if state_dict["state"] else []
        self._import_state(state_dict["state"])

    def _build_cohorts(self) -> list[Cohort]:
        members: dict[tuple[torch.device, torch.dtype, int], list[tuple[int, int, torch.nn.Parameter]]] = {}
        index = 0
        for group_index, group in enumerate(self.param_groups):
            for param in group["params"]:
                bits = 8 if param.numel() >= self.min_8bit_numel else 32
                members.setdefault((param.device, param.dtype, bits), []).append((index, group_index, param))
                index += 1
        return [self._build_cohort(device, bits, rows) for (device, _, bits), rows in members.items()]

    def _build_cohort(self, device: torch.device, bits: int, rows: list[tuple[int, int, torch.nn.Parameter]]) -> Cohort:
        indices, group_of, params = zip(*rows, strict=True)
        paged = PagedState(device) if self.paged else None
        state = AdamWState(
            [param.numel() for param in params],
            group_of,
            state_bits=8 if bits == 8 else 32,
            device=device,
            zeros=None if paged is None else paged.zeros,
        )
        for position, param in enumerate(params):
            self.state[param] = state.views(position)
        return Cohort(indices, params, state, paged, build_stepper(state))

    def _export_state(self) -> dict[int, dict[str, Any]]:
        exported: dict[int, dict[str, Any]] = {}
        for cohort in self._cohorts:
            steps = cohort.stepper.read_steps()
            if not any(steps):
                continue
            # In few transfers: parameter by parameter there are thousands.
            ranges = list(cohort.state.in_ranges(TRANSFER_BYTES))
            copy = copy_to_host if cohort.paged is None else cohort.paged.fetch
            slabs = copy([cohort.state.slab_of(tensors) for tensors in ranges])
            for tensors, slab in zip(ranges, slabs, strict=True):
                for position, views in zip(tensors, cohort.state.divide(slab, tensors), strict=True):
                    if steps[position] > 0:
                        exported[cohort.indices[position]] = {"step": steps[position], **views}
        return dict(sorted(exported.items()))

    def _import_state(self, saved: dict[int, dict[str, Any]]) -> None:
        for cohort in self._cohorts:
            paged = cohort.paged
            steps = [0] * len(cohort.params)
            for position, index in enumerate(cohort.indices):
                if index not in saved:
                    continue
                views = cohort.state.views(position)
                _check_saved(saved[index], views, index)
                for key, view in views.items():
                    if paged is None:
                        view.copy_(saved[index][key])
                    else:
                        paged.evict(view, saved[index][key])
                steps[position] = int(saved[index]["step"])
            cohort.stepper.write_steps(steps)


class AdamW8bit(FlatAdamW):
    """AdamW with moments in 8 bits, blockwise, as bitsandbytes' AdamW8bit.

    Args:
        params: Parameters or groups of them, fp32, bf16 or fp16. Those of fewer than 4096 elements keep fp32 moments.
        lr: Learning rate.
        betas: Decay rates of m and v.
        eps: Added to the root of v.
        weight_decay: Decoupled, times lr.
        paged: Keep the moments in pinned host memory where the parameters are on a GPU. On the CPU they are in host
            memory anyway and nothing changes. The results are the same bits.
    """

    min_8bit_numel = MIN_8BIT_NUMEL


class AdamW32bit(FlatAdamW):
    """AdamW with moments in fp32, as bitsandbytes' AdamW32bit. Arguments as for `AdamW8bit`."""

    min_8bit_numel = float("inf")


def _on(device: torch.device, tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)


def _options_of(group: dict[str, Any]) -> AdamWOptions:
    beta1, beta2 = group["betas"]
    return AdamWOptions(
        lr=float(group["lr"]),
        beta1=float(beta1),
        beta2=float(beta2),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
    )


def _check_group(group: dict[str, Any], index: int) -> None:
    """Raise ConfigError where a group's numbers or parameters cannot be used."""
    allowed = {
        "lr": group["lr"] >= 0.0,
        "betas": len(group["betas"]) == 2 and all(0.0 <= beta < 1.0 for beta in group["betas"]),
        "eps": group["eps"] >= 0.0,
        "weight_decay": group["weight_decay"] >= 0.0,
    }
    for name, good in allowed.items():
        if not good:
            need = "two numbers in [0, 1)" if name == "betas" else "0 or more"
            raise ConfigError(f"optimizer group {index}: {name} is {group[name]!r}; allowed: {need}")
    for position, param in enumerate(group["params"]):
        where = f"parameter {position} of optimizer group {index}"
        if param.dtype not in DTYPES:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise ConfigError(f"{where} is {param.dtype}; AdamW updates {names}")
        if not param.is_contiguous():
            raise ConfigError(f"{where} is not contiguous; replace it by a contiguous copy before training")


def _check_saved(saved: dict[str, Any], views: dict[str, torch.Tensor], index: int) -> None:
    """Raise FormatError where a parameter's saved state is of another kind or size."""
    if saved.keys() != views.keys() | {"step"}:
        raise FormatError(
            f"optimizer state of parameter {index} holds {', '.join(sorted(saved))}; this optimizer needs "
            f"{', '.join(sorted(views.keys() | {'step'}))}: it was saved by another kind of optimizer"
        )
    for key, view in views.items():
        if saved[key].shape != view.shape or saved[key].dtype != view.dtype:
            raise FormatError(
                f"optimizer state of parameter {index}: {key} is {saved[key].dtype} {tuple(saved[key].shape)}, "
                f"expected {view.dtype} {tuple(view.shape)}: it belongs to another parameter"
            )
