"""AdamW with 8-bit and 32-bit moments: the quantiser by brute force, every backend against fp64, exact equalities."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.errors import BackendError, ConfigError
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
    dequantize_8bit_reference,
    quantize_8bit_reference,
)
from halfbyte.ops.adamw8bit_torch import CHUNK_NUMEL, TorchStepper, make_chunks
from halfbyte.quant.codebooks import dynamic_map
from tests.interpreted import assert_passes_interpreted
from tests.ops.adamw8bit_cases import assert_right, assert_same_bits, last, take_steps
from tests.oracles import UNIT_ROUNDOFF, assert_close

CPU = torch.device("cpu")
OPTIONS = AdamWOptions(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
BOTH = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
BITS = pytest.mark.parametrize("state_bits", [8, 32])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])


@BOTH
def test_code_table_holds_the_nearest_codes(signed: bool) -> None:
    values = dynamic_map(signed).double()
    grid = torch.arange(NUM_GRID).double() / GRID_SCALE - 1
    distances = (grid[:, None] - values[None, :]).abs()
    chosen = distances.gather(1, code_table(signed=signed).long()[:, None])[:, 0]
    # Thresholds are halfway points rounded to fp32.
    assert (chosen <= distances.amin(dim=1) + 2 * UNIT_ROUNDOFF[torch.float32]).all()


@BOTH
def test_quantize_8bit_takes_the_nearest_value_on_the_grid(signed: bool) -> None:
    values = dynamic_map(signed)
    middles = (values[:-1] + values[1:]) / 2
    x = torch.cat([middles, values, torch.zeros(1), torch.rand(20_000) ** 8, torch.rand(20_000)])
    x = torch.cat([x, -x]) if signed else x
    rows = torch.nn.functional.pad(x, (0, -x.numel() % (BLOCK_SIZE - 1))).view(-1, BLOCK_SIZE - 1)
    x = torch.cat([torch.ones(len(rows), 1), rows], dim=1).view(-1)
    codes, absmax = quantize_8bit_reference(x, signed=signed)
    assert (absmax == 1).all()
    # Two roundings in fp32 of numbers up to 65535.
    slack = 2 * NUM_GRID * UNIT_ROUNDOFF[torch.float32]
    place = (x.double() + 1) * GRID_SCALE
    nearest = code_table(signed=signed)
    one, other = (nearest[(place + side).round().long().clamp(0, NUM_GRID - 1)] for side in (-slack, slack))
    assert ((codes == one) | (codes == other)).all()


@BOTH
@settings(deadline=None, max_examples=60)
@given(
    numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=600),
    exponent=st.integers(-20, 20),
)
def test_quantize_8bit_round_trip_stays_near(signed: bool, numbers: list[float], exponent: int) -> None:
    x = torch.tensor(numbers, dtype=torch.float32) * 2.0**exponent
    x = x if signed else x.abs()
    codes, absmax = quantize_8bit_reference(x, signed=signed)
    restored = dequantize_8bit_reference(codes, absmax, signed=signed)
    widest = (dynamic_map(signed).diff().max() + 1 / GRID_SCALE) / 2
    scale = absmax.repeat_interleave(BLOCK_SIZE)[: x.numel()]
    assert torch.isfinite(restored).all()
    assert ((restored - x).abs() <= scale * widest * 1.001 + 2.0**-126).all()


@BOTH
def test_quantize_8bit_keeps_a_block_of_zeros(signed: bool) -> None:
    codes, absmax = quantize_8bit_reference(torch.zeros(300), signed=signed)
    assert not absmax.any()
    assert not codes.any()
    assert not dequantize_8bit_reference(codes, absmax, signed=signed).any()


def test_quantize_8bit_shows_what_is_not_finite() -> None:
    x = torch.ones(3, BLOCK_SIZE)
    x[0, 5], x[1, 5] = math.nan, math.inf
    codes, absmax = quantize_8bit_reference(x, signed=True)
    assert torch.equal(absmax.isfinite(), torch.tensor([False, False, True]))
    assert not dequantize_8bit_reference(codes.view(-1), absmax, signed=True).view(3, -1)[:2].isfinite().any()


@BITS
@DTYPES
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_adamw_step_is_right(state_bits: int, dtype: torch.dtype, backend: str) -> None:
    for taken in take_steps(state_bits=state_bits, backend=backend, dtype=dtype):
        assert_right(taken)


@BITS
@DTYPES
def test_adamw_step_torch_equals_reference(state_bits: int, dtype: torch.dtype) -> None:
    expected = last(take_steps(state_bits=state_bits, backend="reference", dtype=dtype))
    assert_same_bits(expected, last(take_steps(state_bits=state_bits, backend="torch", dtype=dtype)))


@BITS
def test_adamw_step_torch_cuts_large_tensors(state_bits: int) -> None:
    numel = CHUNK_NUMEL * 3 + 300
    grads, params = torch.randn(2, numel), [torch.ones(numel), torch.ones(numel)]
    states = [AdamWState([numel], [0], state_bits=8 if state_bits == 8 else 32, device=CPU) for _ in params]
    stepper = build_stepper(states[0])
    assert isinstance(stepper, TorchStepper)
    assert len(stepper.bound) > 1
    for step, grad in enumerate(grads):
        stepper.step_([params[0]], [grad], groups=[OPTIONS], control=StepControl())
        adamw_step_reference_(params[1], grad, states[1].views(0), options=OPTIONS, step=step + 1)
    assert torch.equal(*params)
    for left, right in zip(states[0].views(0).values(), states[1].views(0).values(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.slow
def test_adamw_step_interpreted_kernel_is_right() -> None:
    assert_passes_interpreted(Path(__file__).with_name("interpreted_adamw8bit.py"), num_tests=8)


@settings(deadline=None, max_examples=100)
@given(
    numels=st.lists(st.integers(1, 5000), min_size=1, max_size=12),
    groups=st.lists(st.integers(0, 2), min_size=12, max_size=12),
    chunk_blocks=st.integers(1, 10),
)
def test_make_chunks_covers_every_block_once(numels: list[int], groups: list[int], chunk_blocks: int) -> None:
    state = AdamWState(numels, groups[: len(numels)], state_bits=8, device=CPU)
    covered = []
    for chunk in make_chunks(state, chunk_numel=chunk_blocks * BLOCK_SIZE):
        block = chunk.first_block
        for piece in chunk.pieces:
            assert state.group_of[piece.tensor] == chunk.group
            assert block == state.first_block[piece.tensor] + piece.start // BLOCK_SIZE
            covered.append((piece.tensor, piece.start, piece.stop))
            block += piece.num_blocks
    position = iter(covered)
    for tensor, numel in enumerate(numels):
        start = 0
        while start < numel:
            cut, cut_start, stop = next(position)
            assert (cut, cut_start) == (tensor, start)
            start = stop
        assert start == numel
    assert next(position, None) is None


@BITS
def test_adamw_step_skips_without_counting(state_bits: int) -> None:
    param, grad = torch.randn(5000), torch.full((5000,), math.nan)
    before = param.clone()
    state = AdamWState([5000], [0], state_bits=8 if state_bits == 8 else 32, device=CPU)
    stepper = build_stepper(state)
    stepper.step_([param], [grad], groups=[OPTIONS], control=StepControl(found_inf=torch.tensor(1.0)))
    assert torch.equal(param, before)
    assert stepper.read_steps() == [0]


def test_adamw_step_divides_by_grad_scale() -> None:
    grad, params = torch.randn(5000), [torch.ones(5000), torch.ones(5000)]
    for param, scaled, scale in zip(params, (grad, grad * 1024), (None, torch.tensor(1024.0)), strict=True):
        stepper = build_stepper(AdamWState([5000], [0], state_bits=8, device=CPU))
        stepper.step_([param], [scaled], groups=[OPTIONS], control=StepControl(grad_scale=scale))
    assert torch.equal(*params)


@pytest.mark.parametrize("scale", [0.0, 1e-44, 1e-38, 1e-20, 1e18])
def test_adamw_step_stays_finite(scale: float) -> None:
    param, state = torch.ones(5000), AdamWState([5000], [0], state_bits=8, device=CPU)
    stepper = build_stepper(state)
    for _ in range(3):
        stepper.step_([param], [torch.randn(5000) * scale], groups=[OPTIONS], control=StepControl())
    assert torch.isfinite(param).all()
    assert all(torch.isfinite(view.float()).all() for view in state.views(0).values())


def test_build_stepper_names_what_cannot_run() -> None:
    state = AdamWState([10], [0], state_bits=8, device=CPU)
    with pytest.raises(BackendError, match="cuda"):
        build_stepper(state, backend="cuda")
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(BackendError, match="GPU"):
            build_stepper(state, backend="triton")


def test_adamw_step_refuses_gradients_of_another_kind() -> None:
    param = torch.zeros(4, 4)
    stepper = build_stepper(AdamWState([16], [0], state_bits=32, device=CPU))
    with pytest.raises(ConfigError, match="float16"):
        stepper.step_([param], [param.half()], groups=[OPTIONS], control=StepControl())
    with pytest.raises(ConfigError, match="dense"):
        stepper.step_([param], [param.to_sparse()], groups=[OPTIONS], control=StepControl())


@pytest.mark.gpu
@BITS
@DTYPES
@pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
def test_adamw_step_on_gpu_is_right(state_bits: int, dtype: torch.dtype, paged: bool) -> None:
    for taken in take_steps(state_bits=state_bits, backend="triton", device="cuda", dtype=dtype, paged=paged):
        assert_right(taken)


@pytest.mark.gpu
@BITS
def test_adamw_step_paged_equals_resident(state_bits: int) -> None:
    resident = last(take_steps(state_bits=state_bits, backend="triton", device="cuda", num_steps=8))
    paged = last(take_steps(state_bits=state_bits, backend="triton", device="cuda", num_steps=8, paged=True))
    assert_same_bits(resident, paged)


@pytest.mark.gpu
def test_adamw_step_skips_on_a_device_flag() -> None:
    param = torch.randn(5000, device="cuda")
    stepper = build_stepper(AdamWState([5000], [0], state_bits=8, device=param.device))
    before = param.clone()
    flags = torch.tensor([1.0, 0.0, 1.0], device="cuda")
    for flag in flags:
        stepper.step_([param], [torch.ones_like(param)], groups=[OPTIONS], control=StepControl(found_inf=flag))
    assert stepper.read_steps() == [1]
    assert not torch.equal(param, before)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*Profiler clears events")
def test_adamw_step_updates_many_tensors_in_one_launch() -> None:
    params = [torch.randn(64, 129, device="cuda") for _ in range(448)]
    grads = [torch.randn_like(param) for param in params]
    stepper = build_stepper(AdamWState([p.numel() for p in params], [0] * 448, state_bits=8, device=params[0].device))
    expected = [param.cpu() for param in params]
    stepper.step_(params, grads, groups=[OPTIONS], control=StepControl())
    host = build_stepper(AdamWState([p.numel() for p in expected], [0] * 448, state_bits=8, device=CPU))
    host.step_(expected, [grad.cpu() for grad in grads], groups=[OPTIONS], control=StepControl())
    assert_close("parameters", torch.stack(expected), torch.stack(params).cpu(), dtype=torch.float32, roundings=12)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        stepper.step_(params, grads, groups=[OPTIONS], control=StepControl())
        torch.cuda.synchronize()
    launches = [event.name for event in profile.events() if "adamw8bit" in event.name]
    assert len(launches) == 1


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_adamw_step_does_not_wait_for_the_device() -> None:
    params = [torch.randn(4096, device="cuda") for _ in range(8)]
    stepper = build_stepper(AdamWState([4096] * 8, [0] * 8, state_bits=8, device=params[0].device))
    grads = [torch.randn_like(param) for param in params]
    stepper.step_(params, grads, groups=[OPTIONS], control=StepControl())
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = [grad.clone() for grad in grads]
        options = AdamWOptions(lr=2e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0)
        stepper.step_(params, moved, groups=[options], control=StepControl())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BITS
@pytest.mark.parametrize("max_blocks", [1, 3, 5, 100])
def test_state_divides_into_ranges_of_whole_tensors(state_bits: Literal[8, 32], max_blocks: int) -> None:
    numels = [256, 257, 1, 1024, 700, 512]
    state = AdamWState(numels, [0] * len(numels), state_bits=state_bits, device=CPU)
    for tensor in state.slab_of(state.tensors).values():
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor))
    max_bytes = max_blocks * state.m[0].nbytes
    ranges = list(state.in_ranges(max_bytes))
    assert [tensor for tensors in ranges for tensor in tensors] == list(range(len(numels)))
    for tensors in ranges:
        slab = state.slab_of(tensors)
        assert len(tensors) == 1 or next(iter(slab.values())).nbytes <= max_bytes
        copies = {name: part.clone() for name, part in slab.items()}
        for tensor, views in zip(tensors, state.divide(copies, tensors), strict=True):
            for (name, view), expected in zip(views.items(), state.views(tensor).values(), strict=True):
                assert torch.equal(view, expected), name
