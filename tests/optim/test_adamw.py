"""What an optimizer owes its users: groups, schedulers, skipping, saving and continuing with the same bits."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch

from halfbyte.errors import ConfigError, FormatError
from halfbyte.memory.host_copy import copy_to_host
from halfbyte.optim import AdamW8bit, AdamW32bit
from halfbyte.optim.adamw import FlatAdamW
from tests.oracles import assert_close

SHAPES = ((64, 100), (4096,), (33, 129), (7,), (1, 4095))
BOTH = pytest.mark.parametrize("kind", [AdamW8bit, AdamW32bit])
PAGED = pytest.mark.parametrize("paged", [False, True], ids=["resident", "paged"])
DEVICES = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def make_params(device: str = "cpu") -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [torch.nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device)) for shape in SHAPES]


def give_grads(params: list[torch.nn.Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-3).to(param.device)


def make_optimizer(kind: type[FlatAdamW], params: list[torch.nn.Parameter], *, paged: bool = False) -> FlatAdamW:
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
    return kind(groups, lr=1e-3, paged=paged)


def moments_of(optimizer: FlatAdamW) -> list[torch.Tensor]:
    return [
        value
        for state in optimizer.state_dict()["state"].values()
        for value in state.values()
        if torch.is_tensor(value)
    ]


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@BOTH
@PAGED
@DEVICES
def test_adamw_resumed_equals_uninterrupted(kind: type[FlatAdamW], paged: bool, device: str) -> None:
    straight, resumed = make_params(device), make_params(device)
    first, second = (make_optimizer(kind, params, paged=paged) for params in (straight, resumed))
    for number in range(8):
        if number == 4:
            saved = through_a_file(second.state_dict())
            second = make_optimizer(kind, resumed, paged=paged)
            second.load_state_dict(saved)
        for params, optimizer in ((straight, first), (resumed, second)):
            give_grads(params, number)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(moments_of(first), moments_of(second), strict=True))


@BOTH
@DEVICES
def test_adamw_paged_equals_resident(kind: type[FlatAdamW], device: str) -> None:
    outcomes = []
    for paged in (False, True):
        params = make_params(device)
        optimizer = make_optimizer(kind, params, paged=paged)
        for number in range(6):
            give_grads(params, number)
            optimizer.step()
        outcomes.append([*params, *(moment.to(device) for moment in moments_of(optimizer))])
    assert all(torch.equal(a, b) for a, b in zip(*outcomes, strict=True))


@pytest.mark.gpu
@BOTH
def test_adamw_state_stays_in_pinned_memory_after_loading(kind: type[FlatAdamW]) -> None:
    params = make_params("cuda")
    give_grads(params, 0)
    resident, paged = make_optimizer(kind, params), make_optimizer(kind, params, paged=True)
    resident.step()
    paged.load_state_dict(through_a_file(resident.state_dict()))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    paged.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before < paged.state_bytes
    for state in paged.state.values():
        assert all(tensor.is_pinned() and tensor.device.type == "cpu" for tensor in state.values())


@DEVICES
def test_adamw32bit_agrees_with_torch(device: str) -> None:
    ours, theirs = make_params(device), make_params(device)
    first = make_optimizer(AdamW32bit, ours)
    second = torch.optim.AdamW(
        [{"params": theirs[:2], "weight_decay": 0.1}, {"params": theirs[2:], "weight_decay": 0.0}], lr=1e-3
    )
    for number in range(10):
        for params, optimizer in ((ours, first), (theirs, second)):
            give_grads(params, number)
            optimizer.step()
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(f"parameter {index}", b, a, dtype=torch.float32, roundings=10 * 8)


def test_adamw8bit_keeps_small_parameters_in_fp32() -> None:
    params = make_params()
    optimizer = make_optimizer(AdamW8bit, params)
    give_grads(params, 0)
    optimizer.step()
    widths = [set(optimizer.state[param]) for param in params]
    codes, plain = {"m_codes", "m_absmax", "v_codes", "v_absmax"}, {"m", "v"}
    assert widths == [codes, codes, codes, plain, plain]


def test_adamw8bit_state_takes_two_bytes_a_parameter() -> None:
    param = torch.nn.Parameter(torch.zeros(1024, 256))
    optimizer = AdamW8bit([param], lr=1e-3)
    assert optimizer.state_bytes == 0
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state_bytes == param.numel() * (2 + 2 * 4 / 256)


@BOTH
@DEVICES
def test_adamw_follows_a_scheduler(kind: type[FlatAdamW], device: str) -> None:
    scheduled, by_hand = make_params(device), make_params(device)
    first, second = make_optimizer(kind, scheduled), make_optimizer(kind, by_hand)
    scheduler = torch.optim.lr_scheduler.LambdaLR(first, lambda step: 1 / (1 + step))
    for number in range(5):
        give_grads(scheduled, number)
        give_grads(by_hand, number)
        for group in second.param_groups:
            group["lr"] = 1e-3 / (1 + number)
        first.step()
        scheduler.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(scheduled, by_hand, strict=True))


@BOTH
@DEVICES
def test_adamw_leaves_parameters_without_gradient(kind: type[FlatAdamW], device: str) -> None:
    params = make_params(device)
    optimizer = make_optimizer(kind, params)
    before = [param.detach().clone() for param in params]
    give_grads(params, 0)
    params[1].grad = params[3].grad = None
    optimizer.step()
    moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
    assert moved == [True, False, True, False, True]
    assert sorted(optimizer.state_dict()["state"]) == [0, 2, 4]


@BOTH
@DEVICES
def test_adamw_works_with_zero_grad_and_clipping(kind: type[FlatAdamW], device: str) -> None:
    clipped, scaled = make_params(device), make_params(device)
    first, second = make_optimizer(kind, clipped), make_optimizer(kind, scaled)
    for number in range(4):
        for params, optimizer in ((clipped, first), (scaled, second)):
            optimizer.zero_grad(set_to_none=True)
            give_grads(params, number)
        torch.nn.utils.clip_grad_norm_(clipped, 0.01)
        norm = torch.nn.utils.get_total_norm([param.grad for param in scaled])
        coefficient = torch.clamp(0.01 / (norm + 1e-6), max=1.0)
        for param in scaled:
            param.grad.mul_(coefficient)
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(clipped, scaled, strict=True))


@BOTH
@DEVICES
def test_adamw_skips_as_a_gradient_scaler_says(kind: type[FlatAdamW], device: str) -> None:
    params = make_params(device)
    optimizer = make_optimizer(kind, params)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0)
    reference = make_params(device)
    plain = make_optimizer(kind, reference)
    for number, broken in enumerate((False, True, False)):
        give_grads(params, number)
        give_grads(reference, number)
        for param in params:
            param.grad.mul_(scaler.scale(torch.ones((), device=device)))
        if broken:
            params[2].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if not broken:
            plain.step()
    assert all(torch.equal(a, b) for a, b in zip(params, reference, strict=True))
    assert {state["step"] for state in optimizer.state_dict()["state"].values()} == {2}


@BOTH
def test_adamw_add_param_group_keeps_state(kind: type[FlatAdamW]) -> None:
    together, later = make_params(), make_params()
    first, second = kind(together, lr=1e-3), kind(later[:3], lr=1e-3)
    for number in range(4):
        if number == 2:
            second.add_param_group({"params": later[3:]})
        give_grads(together, number)
        give_grads(later, number)
        for param in together[3:]:
            param.grad = param.grad if number >= 2 else None
        first.step()
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(together, later, strict=True))


@BOTH
def test_adamw_empty_state_dict_loads(kind: type[FlatAdamW]) -> None:
    params = make_params()
    optimizer = make_optimizer(kind, params)
    optimizer.load_state_dict(optimizer.state_dict())
    give_grads(params, 0)
    optimizer.step()
    assert len(optimizer.state_dict()["state"]) == len(params)


@BOTH
@PAGED
@DEVICES
def test_adamw_state_dict_is_a_copy_in_host_memory(kind: type[FlatAdamW], paged: bool, device: str) -> None:
    params = make_params(device)
    optimizer = make_optimizer(kind, params, paged=paged)
    give_grads(params, 0)
    optimizer.step()
    kept = [tensor.to("cpu", copy=True) for param in params for tensor in optimizer.state[param].values()]
    give_grads(params, 1)
    saved = optimizer.state_dict()
    optimizer.step()
    copies = [value for state in saved["state"].values() for value in state.values() if torch.is_tensor(value)]
    assert all(copy.device.type == "cpu" for copy in copies)
    assert all(torch.equal(copy, tensor) for copy, tensor in zip(copies, kept, strict=True))
    saved["param_groups"][0]["params"].clear()
    assert len(optimizer.param_groups[0]["params"]) == 2


@BOTH
def test_adamw_state_is_saved_once_and_loads_as_if_saved_tensor_by_tensor(kind: type[FlatAdamW]) -> None:
    params = make_params()
    optimizer = make_optimizer(kind, params)
    for number in range(2):
        give_grads(params, number)
        optimizer.step()
    saved = optimizer.state_dict()
    apart = copy_to_host(saved)
    assert len({tensor.untyped_storage().data_ptr() for tensor in moments_of(optimizer)}) < len(params) * 2
    sizes = []
    for state_dict in (saved, apart):
        buffer = io.BytesIO()
        torch.save(state_dict, buffer)
        sizes.append(buffer.tell())
        again = make_optimizer(kind, make_params())
        again.load_state_dict(through_a_file(state_dict))
        assert all(torch.equal(a, b) for a, b in zip(moments_of(again), moments_of(optimizer), strict=True))
    # Up to a block of each moment is unused at the end of a parameter.
    assert sizes[0] <= sizes[1] + len(params) * 2 * 256 * 4


def test_adamw_refuses_the_state_of_another_optimizer() -> None:
    params = make_params()
    give_grads(params, 0)
    eight, wide = make_optimizer(AdamW8bit, params), make_optimizer(AdamW32bit, params)
    wide.step()
    with pytest.raises(FormatError, match="another kind"):
        eight.load_state_dict(wide.state_dict())
    with pytest.raises(FormatError, match="does not fit"):
        AdamW32bit(params[:2], lr=1e-3).load_state_dict(wide.state_dict())
    swapped = wide.state_dict()
    swapped["state"][0], swapped["state"][1] = swapped["state"][1], swapped["state"][0]
    with pytest.raises(FormatError, match="another parameter"):
        wide.load_state_dict(swapped)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0"),
        ({"lr": 1e-3, "betas": (0.9, 1.0)}, "betas is"),
        ({"lr": 1e-3, "eps": -1e-8}, "eps is"),
        ({"lr": 1e-3, "weight_decay": -0.1}, "weight_decay is"),
    ],
)
def test_adamw_refuses_numbers_out_of_range(numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdamW8bit(make_params(), **numbers)


def test_adamw_refuses_what_it_cannot_update() -> None:
    with pytest.raises(ConfigError, match="float64"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))], lr=1e-3)
    with pytest.raises(ConfigError, match="contiguous"):
        AdamW8bit([torch.nn.Parameter(torch.zeros(4, 6).t())], lr=1e-3)
    with pytest.raises(ConfigError, match="closure"):
        AdamW8bit(make_params(), lr=1e-3).step(lambda: 0.0)
