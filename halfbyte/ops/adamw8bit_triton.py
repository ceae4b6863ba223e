"""AdamW with 8-bit or 32-bit moments on a GPU: one launch, and nothing that waits for the device.

The host's part of a step is to learn where the gradients lie. Addresses and the groups' numbers go to the device only
when they have changed, in a fresh tensor each time: torch's allocators, of pinned and of device memory, keep a freed
block away from new owners until the copies and kernels that use it are done, so nothing here has to wait or be reused
by hand.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from halfbyte.kernels import adamw8bit as kernels
from halfbyte.ops.adamw8bit import AdamWOptions, AdamWState, StepControl, check_tensors, code_table
from halfbyte.quant.codebooks import dynamic_map

# In bytes of an address and in elements of a tensor.
ALIGNMENT = 16


class TritonStepper:
    """Updates the tensors of one state, all of one dtype, with one launch."""

    def __init__(self, state: AdamWState) -> None:
        self.state = state
        self.tables = kernels.build_tables(state.numels, state.first_block[:-1], state.group_of, device=state.device)
        self.moments = kernels.Moments(state.m, state.v, state.m_absmax, state.v_absmax)
        self.codes = code_tables(state.device) if state.state_bits == 8 else None
        self._addresses: list[int] = []
        self._uploaded_addresses = torch.empty(0)
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
        # Copies of strided gradients stay alive until the launch; after that stream order protects their memory.
        grads = [None if grad is None else grad.contiguous() for grad in grads]
        addresses = [param.data_ptr() for param in params]
        addresses += [0 if grad is None else grad.data_ptr() for grad in grads]
        if addresses != self._addresses:
            check_tensors(params, grads)
            self._addresses = addresses
            self._uploaded_addresses = self._upload(addresses, torch.int64)
        hyper = [_hyper_row(group) for group in groups]
        if hyper != self._hyper:
            self._hyper = hyper
            self._uploaded_hyper = self._upload(hyper, torch.float64)
        inputs = kernels.LaunchInputs(
            addresses=self._uploaded_addresses,
            hyper=self._uploaded_hyper,
            grad_scale=control.grad_scale,
            skip=control.found_inf,
            dtype=params[0].dtype,
            aligned=not any(count % ALIGNMENT for count in (*addresses, *self.state.numels)),
        )
        kernels.adamw8bit(self.tables, self.moments, self.codes, inputs)

    def read_steps(self) -> list[int]:
        return self.tables.steps[self.tables.row].tolist()

    def write_steps(self, steps: Sequence[int]) -> None:
        self.tables.steps[self.tables.row] = torch.tensor(steps, dtype=torch.int32)

    def _upload(self, values: Sequence[object], dtype: torch.dtype) -> torch.Tensor:
        pinned = torch.tensor(values, dtype=dtype, pin_memory=self.state.device.type == "cuda")
        return pinned.to(self.state.device, non_blocking=True)


@functools.cache
def code_tables(device: torch.device) -> kernels.CodeTables:
    """Return the maps and search tables on a device, shared by all states there."""
    return kernels.CodeTables(
        values=torch.stack([dynamic_map(True), dynamic_map(False)]).to(device),
        codes=torch.stack([code_table(signed=True), code_table(signed=False)]).to(device),
    )


def _hyper_row(group: AdamWOptions) -> list[float]:
    log1, log2 = (math.log(beta) if beta > 0 else -math.inf for beta in (group.beta1, group.beta2))
    return [group.lr, group.beta1, group.beta2, log1, log2, group.eps, group.weight_decay, 0.0]
