from __future__ import annotations

import pytest
import torch

from halfbyte.optim import build_optimizer
from halfbyte.train.bad_steps import BadSteps, DivergedError
from halfbyte.train.guard import GROWTH_STEPS, INITIAL_SCALE, STEPS_BEFORE_SPIKES, LossScaler, StepGuard
from tests.oracles import assert_close

OPTIMIZERS = ["adamw_8bit", "adamw_torch", "adamw_torch_fused"]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(70, 64, generator=generator)) for _ in range(3)]


def set_gradients(values: list[torch.nn.Parameter], *, seed: int, factor: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for value in values:
        value.grad = torch.randn(value.shape, generator=generator) * factor


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("max_norm", [0.0, 0.3, 1e6])
def test_step_guard_clips_as_torch_does(name: str, max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    optimizers = [build_optimizer(name, values, lr=1e-2) for values in (ours, theirs)]
    guard = StepGuard(optimizers[0], max_norm=max_norm)
    for step in range(1, 4):
        set_gradients(ours, seed=step)
        set_gradients(theirs, seed=step)
        guard.see_loss(torch.tensor(1.0), ["a"], step=step)
        norm = guard.close_step(step)
        expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm or torch.inf)
        assert_close("norm", expected, norm, dtype=torch.float32, roundings=4)
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert_close("parameter", b, a, dtype=torch.float32, roundings=64)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_guard_scales_the_loss_and_skips_overflow(name: str) -> None:
    ours, theirs = parameters(), parameters()
    optimizers = [build_optimizer(name, values, lr=1e-2) for values in (ours, theirs)]
    scaler = LossScaler(torch.device("cpu"))
    guard = StepGuard(optimizers[0], max_norm=0.3, scaler=scaler)
    for step in range(1, 4):
        scale = scaler.scale.item()
        set_gradients(ours, seed=step, factor=scale)
        set_gradients(theirs, seed=step)
        if step == 2:
            ours[1].grad[0, 0] = torch.inf
            before = [value.detach().clone() for value in ours]
        guard.see_loss(torch.tensor(2.0), ["a"], step=step)
        norm = guard.close_step(step)
        optimizers[0].step()
        if step == 2:
            assert all(torch.equal(a, b) for a, b in zip(before, ours, strict=True))
            assert scaler.scale.item() == scale / 2
            continue
        expected = torch.nn.utils.clip_grad_norm_(theirs, 0.3)
        assert_close("norm", expected, norm, dtype=torch.float32, roundings=4)
        optimizers[1].step()
    for a, b in zip(ours, theirs, strict=True):
        assert_close("parameter", b, a, dtype=torch.float32, roundings=64)


def test_loss_scaler_grows_and_comes_back_from_a_file() -> None:
    scaler = LossScaler(torch.device("cpu"))
    for _ in range(GROWTH_STEPS):
        scaler.update(torch.tensor(False))
    assert scaler.state_dict() == {"scale": 2 * INITIAL_SCALE, "good_steps": 0.0}
    scaler.update(torch.tensor(False))
    other = LossScaler(torch.device("cpu"))
    other.load_state_dict(scaler.state_dict())
    assert other.state_dict() == scaler.state_dict() == {"scale": 2 * INITIAL_SCALE, "good_steps": 1.0}


def test_step_guard_stops_at_the_smallest_scale() -> None:
    values = parameters()
    scaler = LossScaler(torch.device("cpu"))
    guard = StepGuard(build_optimizer("adamw_8bit", values, lr=1e-2), max_norm=0.3, scaler=scaler)
    steps = 0
    while scaler.scale.item() > 1:
        steps += 1
        set_gradients(values, seed=steps, factor=torch.inf)
        guard.see_loss(torch.tensor(1.0), ["a"], step=steps)
        guard.close_step(steps)
    assert 2.0**steps == INITIAL_SCALE
    guard.see_loss(torch.tensor(1.0), ["a"], step=steps + 1)
    with pytest.raises(DivergedError, match="gradient is not finite"):
        guard.close_step(steps + 1)


def test_step_guard_names_the_bad_micro_batch() -> None:
    guard = StepGuard(build_optimizer("adamw_8bit", parameters(), lr=1e-2), max_norm=0.3)
    guard.see_loss(torch.tensor(1.0), ["good.jsonl:1"], step=5)
    origins = [f"bad.jsonl:{number}" for number in range(20)]
    with pytest.raises(DivergedError) as error:
        guard.see_loss(torch.tensor(torch.inf), origins, step=5)
    assert "step 5: the loss is inf" in str(error.value)
    assert "bad.jsonl:11 and 8 more" in str(error.value)
    assert "good.jsonl" not in str(error.value)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_guard_skips_bad_steps_alone(name: str) -> None:
    """What is left is what the good steps alone would have come to."""
    ours, theirs = parameters(), parameters()
    optimizers = [build_optimizer(name, values, lr=1e-2) for values in (ours, theirs)]
    told: list[str] = []
    guards = [
        StepGuard(optimizer, max_norm=0.3, bad_steps=bad)
        for optimizer, bad in zip(optimizers, (BadSteps(on_bad_step="skip", tell=told.append), None), strict=True)
    ]
    for step in range(1, 6):
        for values, guard, optimizer in zip((ours, theirs), guards, optimizers, strict=True):
            if step in (2, 4) and values is theirs:
                continue
            set_gradients(values, seed=step, factor=torch.nan if step == 2 else 1.0)
            guard.see_loss(torch.tensor(torch.inf if step == 4 else 1.0), [f"x:{step}"], step=step)
            guard.close_step(step)
            optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    assert [line.split(". Nothing")[0] for line in told] == [
        "step 2: the gradient is not finite. The batch holds x:2",
        "step 4: the loss is inf. The batch holds x:4",
    ]


def run_losses(guard: StepGuard, losses: list[float]) -> None:
    for step, loss in enumerate(losses, start=1):
        set_gradients(guard.parameters, seed=step)
        guard.see_loss(torch.tensor(loss), [f"x:{step}"], step=step)
        guard.close_step(step)


def test_step_guard_takes_a_spike_for_bad_once_it_knows_the_mean() -> None:
    told: list[str] = []

    def make(spike: float | None) -> StepGuard:
        bad = BadSteps(on_bad_step="skip", tell=told.append)
        return StepGuard(
            build_optimizer("adamw_8bit", parameters(), lr=1e-2), max_norm=0.3, bad_steps=bad, loss_spike=spike
        )

    early = [9.0 if step == STEPS_BEFORE_SPIKES - 1 else 1.0 for step in range(STEPS_BEFORE_SPIKES)]
    guard = make(3.0)
    run_losses(guard, [1.0] * STEPS_BEFORE_SPIKES + [2.9, 3.2, 1.0])
    assert [line.split(". The")[0] for line in told] == [
        "step 22: the loss is 3.2, above the 3.114 that train.loss_spike allows here"
    ]
    told.clear()
    run_losses(make(None), [1.0] * STEPS_BEFORE_SPIKES + [99.0])
    run_losses(make(3.0), early)
    assert told == []
    again = make(3.0)
    again.load_state_dict(guard.state_dict())
    assert again.state_dict() == guard.state_dict()


def test_step_guard_gives_up_after_many_bad_steps_in_a_row() -> None:
    told: list[str] = []
    guard = StepGuard(
        build_optimizer("adamw_8bit", parameters(), lr=1e-2),
        max_norm=0.3,
        bad_steps=BadSteps(on_bad_step="skip", tell=told.append),
    )
    with pytest.raises(DivergedError, match=r"step 14: .* nor of the 9 before it"):
        run_losses(guard, [1.0, 1.0, torch.nan, 1.0, *([torch.nan] * 20)])
    assert len(told) == 10


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_step_guard_is_told_one_step_late_and_applies_nothing(name: str) -> None:
    values = [torch.nn.Parameter(value.detach().cuda()) for value in parameters()]
    guard = StepGuard(build_optimizer(name, values, lr=1e-2), max_norm=0.3)
    for step in (1, 2):
        for value in values:
            value.grad = torch.randn_like(value)
        if step == 2:
            before = [value.detach().clone() for value in values]
            values[0].grad[0, 0] = torch.nan
        guard.see_loss(torch.tensor(1.0 if step == 1 else torch.nan, device="cuda"), [f"x:{step}"], step=step)
        guard.close_step(step)
        guard.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, values, strict=True))
    with pytest.raises(DivergedError, match=r"step 2: the loss is nan\. The batch holds x:2"):
        guard.finish()
