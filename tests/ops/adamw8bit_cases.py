"""Steps of AdamW on tensors of awkward sizes for every backend and device, each step checked against fp64."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import torch

from halfbyte.memory.paged_state import PagedState
from halfbyte.ops.adamw8bit import (
    BLOCK_SIZE,
    GRID_SCALE,
    NUM_GRID,
    AdamWOptions,
    AdamWState,
    StepControl,
    adamw_step_reference_,
    build_stepper,
    code_table,
)
from halfbyte.quant.codebooks import dynamic_map
from tests.oracles import UNIT_ROUNDOFF

# One block and less, one more than a block, exactly 4096, and some that a program does not hold.
SHAPES = ((1,), (63,), (256,), (257,), (3, 5, 7), (16, 256), (4097,), (100, 301))
GROUP_OF = (0, 0, 0, 0, 1, 1, 1, 1)
# (step, tensor) without a gradient.
NO_GRADIENT = {(1, 3), (2, 3), (0, 6)}
FP32 = UNIT_ROUNDOFF[torch.float32]
SMALLEST = 2.0**-149


@dataclasses.dataclass
class Snapshot:
    """Parameters, moments and step counts, on the CPU."""

    params: list[torch.Tensor]
    moments: list[dict[str, torch.Tensor]]
    steps: list[int]


@dataclasses.dataclass
class Taken:
    """One step: what was before, what came in, what came out."""

    before: Snapshot
    grads: list[torch.Tensor | None]
    groups: list[AdamWOptions]
    after: Snapshot


def take_steps(
    *,
    state_bits: int,
    backend: str,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    paged: bool = False,
    num_steps: int = 4,
) -> Iterator[Taken]:
    """Take steps with two groups, a schedule, weight decay and missing gradients; backend "reference" included."""
    generator = torch.Generator().manual_seed(1)

    def draw(shape: tuple[int, ...], scale: float) -> torch.Tensor:
        spread = torch.rand(shape, generator=generator).pow(6)
        return (torch.randn(shape, generator=generator) * spread * scale).to(dtype).to(device)

    params = [draw(shape, 0.02) for shape in SHAPES]
    where = torch.device(device)
    state = AdamWState(
        [param.numel() for param in params],
        GROUP_OF,
        state_bits=8 if state_bits == 8 else 32,
        device=where,
        zeros=PagedState(where).zeros if paged else None,
    )
    stepper = None if backend == "reference" else build_stepper(state, backend=backend)
    steps = [0] * len(params)

    def snapshot() -> Snapshot:
        counted = steps if stepper is None else stepper.read_steps()
        if device != "cpu":
            torch.cuda.synchronize()
        moments = [{key: view.cpu() for key, view in state.views(i).items()} for i in range(len(params))]
        return copy.deepcopy(Snapshot([param.cpu() for param in params], moments, counted))

    for number in range(num_steps):
        grads = [draw(shape, 1e-3) for shape in SHAPES]
        given = [None if (number, tensor) in NO_GRADIENT else grad for tensor, grad in enumerate(grads)]
        groups = [
            AdamWOptions(lr=1e-3 * (number + 1), beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0),
            AdamWOptions(lr=1e-3 / (number + 1), beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1),
        ]
        before = snapshot()
        if stepper is not None:
            stepper.step_(params, given, groups=groups, control=StepControl())
        else:
            for tensor, grad in enumerate(given):
                if grad is not None:
                    steps[tensor] += 1
                    adamw_step_reference_(
                        params[tensor],
                        grad,
                        state.views(tensor),
                        options=groups[GROUP_OF[tensor]],
                        step=steps[tensor],
                    )
        yield Taken(before, [None if grad is None else grad.cpu() for grad in given], groups, snapshot())


def last(taken: Iterator[Taken]) -> Snapshot:
    """Return what the last step left."""
    return list(taken)[-1].after


def assert_same_bits(expected: Snapshot, actual: Snapshot) -> None:
    """Demand equal parameters, moments and step counts."""
    assert expected.steps == actual.steps
    for tensor, (a, b) in enumerate(zip(expected.params, actual.params, strict=True)):
        assert torch.equal(a, b), f"parameter {tensor}"
    for tensor, (left, right) in enumerate(zip(expected.moments, actual.moments, strict=True)):
        for key, moment in left.items():
            assert torch.equal(moment, right[key]), f"{key} of parameter {tensor}"


def assert_right(taken: Taken) -> None:
    """Demand that every element of every tensor is as near the fp64 result as its fp32 roundings allow."""
    for tensor, grad in enumerate(taken.grads):
        before, after = taken.before, taken.after
        if grad is None:
            assert before.steps[tensor] == after.steps[tensor]
            assert torch.equal(before.params[tensor], after.params[tensor])
            for key, moment in before.moments[tensor].items():
                assert torch.equal(moment, after.moments[tensor][key]), f"{key} of parameter {tensor}"
            continue
        step = after.steps[tensor]
        assert step == before.steps[tensor] + 1
        options = taken.groups[GROUP_OF[tensor]]
        m, v = (restored_64(before.moments[tensor], name) for name in ("m", "v"))
        g, p = grad.double().view(-1), before.params[tensor].double().view(-1)
        new_m = options.beta1 * m + (1 - options.beta1) * g
        new_v = options.beta2 * v + (1 - options.beta2) * g * g
        m_error = 4 * FP32 * (options.beta1 * m.abs() + (1 - options.beta1) * g.abs()) + 2 * SMALLEST
        assert_moment(after.moments[tensor], "m", new_m, m_error)
        assert_moment(after.moments[tensor], "v", new_v, 5 * FP32 * new_v + 2 * SMALLEST)
        c1, c2 = options.corrections(step)
        rate = options.lr / c1 / (new_v.sqrt() / c2 + options.eps)
        expected = p * (1 - options.lr * options.weight_decay) - rate * new_m
        size = p.abs() + rate * new_m.abs()
        # A number under the smallest normal one is rounded to a multiple of the smallest, not to a fraction of itself.
        limit = (
            rate * m_error
            + 12 * FP32 * size
            + UNIT_ROUNDOFF[grad.dtype] * size.clamp(min=torch.finfo(grad.dtype).smallest_normal)
        )
        error = (after.params[tensor].double().view(-1) - expected).abs()
        assert (error <= limit).all(), f"parameter {tensor}: off by up to {(error / limit).max():.2f} of the limit"


def restored_64(moments: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """Return a moment in fp64, rounded to fp32 as the formula says."""
    if name in moments:
        return moments[name].double()
    codes, absmax = moments[f"{name}_codes"], moments[f"{name}_absmax"]
    values = dynamic_map(name == "m")[codes.long()]
    return (values * absmax.repeat_interleave(BLOCK_SIZE)[: codes.numel()]).double()


def assert_moment(moments: dict[str, torch.Tensor], name: str, exact: torch.Tensor, error: torch.Tensor) -> None:
    """Demand fp32 values within `error`, or absmax within it and the code of a number within it."""
    if name in moments:
        assert ((moments[name].double() - exact).abs() <= error).all(), name
        return
    codes, absmax = moments[f"{name}_codes"].long(), moments[f"{name}_absmax"].double()
    assert torch.isfinite(absmax).all()
    padded = torch.nn.functional.pad(torch.stack([exact, error]), (0, -exact.numel() % BLOCK_SIZE))
    exact_blocks, error_blocks = padded.view(2, -1, BLOCK_SIZE)
    assert ((absmax - exact_blocks.abs().amax(1)).abs() <= error_blocks.amax(1)).all(), f"absmax of {name}"
    scale = absmax.repeat_interleave(BLOCK_SIZE)[: exact.numel()]
    assert (codes[scale == 0] == 0).all()
    scaled = torch.where(scale == 0, 0.0, exact / scale)
    # Besides the moment's own error: the roundings of the scaled number, of adding 1 and of the place on the grid.
    slack = GRID_SCALE * (torch.where(scale == 0, 0.0, error / scale) + 12 * FP32)
    place = (scaled + 1) * GRID_SCALE + 0.5
    table = code_table(signed=name == "m")
    lowest, highest = (table[side.floor().long().clamp(0, NUM_GRID - 1)] for side in (place - slack, place + slack))
    inside = (lowest <= codes) & (codes <= highest)
    # The reciprocal of a denormal absmax is infinite.
    assert inside[scale >= 2.0**-126].all(), f"codes of {name}"
