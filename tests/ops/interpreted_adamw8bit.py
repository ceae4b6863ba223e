"""The Triton kernel under Triton's interpreter, run by test_adamw8bit.py in a process of its own.

The interpreter has to be asked for before triton is first imported, and works on numpy arrays in host memory.
"""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.adamw8bit import AdamWOptions, AdamWState, StepControl, build_stepper
from tests.ops.adamw8bit_cases import assert_right, take_steps

# numpy says aloud what a GPU does silently: a block of zeros is divided by zero, and takes code 0.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
]
OPTIONS = AdamWOptions(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)


@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_kernel_is_right(state_bits: int, dtype: torch.dtype) -> None:
    for taken in take_steps(state_bits=state_bits, backend="triton", dtype=dtype, num_steps=3):
        assert_right(taken)


@pytest.mark.parametrize("state_bits", [8, 32])
def test_kernel_skips_without_counting(state_bits: int) -> None:
    param = torch.randn(5000)
    state = AdamWState([5000], [0], state_bits=8 if state_bits == 8 else 32, device=param.device)
    stepper = build_stepper(state, backend="triton")

    def step(found_inf: float) -> list[torch.Tensor]:
        control = StepControl(found_inf=torch.tensor([found_inf]))
        stepper.step_([param], [torch.randn(5000)], groups=[OPTIONS], control=control)
        return [t.clone() for t in (param, *state.views(0).values())]

    first = step(0.0)
    assert stepper.read_steps() == [1]
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, step(1.0), strict=True))
        assert stepper.read_steps() == [1]
    assert not any(torch.equal(a, b) for a, b in zip(first, step(0.0), strict=True))
    assert stepper.read_steps() == [2]


def test_kernel_divides_by_grad_scale() -> None:
    grad = torch.randn(5000)
    params = [torch.ones(5000), torch.ones(5000)]
    for param, given, scale in zip(params, (grad, grad * 1024), (None, torch.tensor(1024.0)), strict=True):
        state = AdamWState([5000], [0], state_bits=8, device=param.device)
        stepper = build_stepper(state, backend="triton")
        stepper.step_([param], [given], groups=[OPTIONS], control=StepControl(grad_scale=scale))
    assert torch.equal(*params)


def test_kernel_follows_moved_and_strided_gradients() -> None:
    outcomes = []
    for strided in (False, True):
        torch.manual_seed(0)
        param, state = torch.zeros(70, 90), AdamWState([6300], [0], state_bits=8, device=torch.device("cpu"))
        stepper = build_stepper(state, backend="triton")
        for _ in range(3):
            grad = torch.randn(70, 90)
            grad = grad.t().contiguous().t() if strided else grad
            stepper.step_([param], [grad], groups=[OPTIONS], control=StepControl())
        outcomes.append(param)
    assert torch.equal(*outcomes)
