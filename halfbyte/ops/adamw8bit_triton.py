"""AdamW with 8-bit or 32-bit moments on a GPU: one launch, and nothing that waits for the device.

The host's part of a step is to learn where the gradients lie. Addresses and the groups' numbers go to the device only
when they are new, in a fresh tensor each time: torch's allocators, of pinned and of device memory, keep a freed block
away from new owners until the copies and kernels that use it are done, so nothing here has to wait or be reused by
hand. A training loop that frees its gradients gets the same few sets of addresses again and again, so the last few
tables of them stay on the device.
"""

from __future__ import annotations

import array
import dataclasses
import functools
import math
import operator
from collections.abc import Sequence

import torch

from halfbyte.kernels import adamw8bit as kernels
from halfbyte.ops.adamw8bit import AdamWOptions, AdamWState, StepControl, check_tensors, code_table
from halfbyte.quant.codebooks import dynamic_map

# In bytes of an address and in elements of a tensor.
ALIGNMENT = 16
MAX_RECENT_PLACES = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Places:
    """Where parameters and gradients lie."""

    uploaded: torch.Tensor
    """The addresses of the parameters, then of the gradients, 0 for one that is None; int64 on the device."""
    aligned: bool
    """Whether all of them, and all numels, are multiples of 16."""


class TritonStepper:
    """Updates the tensors of one state, all of one dtype, with one launch."""

    def __init__(self, state: AdamWState) -> None:
        self.state = state
        self.tables = kernels.build_tables(state.numels, state.first_block[:-1], state.group_of, device=state.device)
        self.moments = kernels.Moments(state.m, state.v, state.m_absmax, state.v_absmax)
        self.codes = code_tables(state.device) if state.state_bits == 8 else None
        self._numels_are_aligned = not any(numel % ALIGNMENT for numel in state.numels)
        self._recent: dict[tuple[int, ...], Places] = {}
        self._hyper: list[list[float]] = []
        self._uploaded_hyper = torch.empty(0)

    def step_(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        *,
        groups: Sequence[AdamWOptions],
        control: StepControl,
    ) -> None:
        if not params:
            return
        if not self._recent:
            # Once: torch itself demands that a gradient agrees with its parameter.
            check_tensors(params, grads)
        # Copies live until the launch is queued; the allocator keeps their memory until it has run.
        grads = [grad if grad is None or grad.is_contiguous() else grad.contiguous() for grad in grads]
        addresses = (
            *[param.data_ptr() for param in params],
            *[0 if grad is None else grad.data_ptr() for grad in grads],
        )
        places = self._recent.get(addresses) or self._upload_places(addresses)
        hyper = [_hyper_row(group) for group in groups]
        if hyper != self._hyper:
            self._hyper = hyper
            self._uploaded_hyper = self._upload(torch.tensor(hyper, dtype=torch.float64))
        inputs = kernels.LaunchInputs(
            addresses=places.uploaded,
            hyper=self._uploaded_hyper,
            grad_scale=control.grad_scale,
            skip=control.found_inf,
            dtype=params[0].dtype,
            aligned=places.aligned,
        )
        kernels.adamw8bit(self.tables, self.moments, self.codes, inputs)
        # The kernel writes by address, which autograd and whoever keeps a cast of a parameter cannot see.
        torch.autograd.graph.increment_version(list(params))

    def read_steps(self) -> list[int]:
        return self.tables.steps[self.tables.row].tolist()

    def write_steps(self, steps: Sequence[int]) -> None:
        self.tables.steps[self.tables.row] = torch.tensor(steps, dtype=torch.int32)

    def _upload_places(self, addresses: tuple[int, ...]) -> Places:
        aligned = self._numels_are_aligned and functools.reduce(operator.or_, addresses) % ALIGNMENT == 0
        # An array first: torch takes a list four times as slowly.
        uploaded = self._upload(torch.frombuffer(array.array("q", addresses), dtype=torch.int64))
        if len(self._recent) == MAX_RECENT_PLACES:
            del self._recent[next(iter(self._recent))]
        self._recent[addresses] = Places(uploaded, aligned)
        return self._recent[addresses]

    def _upload(self, values: torch.Tensor) -> torch.Tensor:
        if self.state.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.state.device, non_blocking=True)


@functools.cache
def code_tables(device: torch.device) -> kernels.CodeTables:
    """Return the maps and code tables on a device, shared by all states there."""
    return kernels.CodeTables(
        values=torch.stack([dynamic_map(True), dynamic_map(False)]).to(device),
        codes=torch.stack([code_table(signed=True), code_table(signed=False)]).to(device),
    )


def _hyper_row(group: AdamWOptions) -> list[float]:
    log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in (group.beta1, group.beta2))
    return [group.lr, group.beta1, group.beta2, log1, log2, group.eps, group.weight_decay, 0.0]
