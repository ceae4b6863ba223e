"""The chunked loss against F.cross_entropy on whole logits in fp64; its kernel is interpreted in tests/kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from halfbyte.errors import BackendError
from halfbyte.kernels.cross_entropy import CrossEntropyLaunch
from halfbyte.ops import cross_entropy
from halfbyte.ops.cross_entropy import (
    OwnRows,
    chunked_cross_entropy,
    chunked_token_losses,
    cross_entropy_reference,
    find_trained_tokens,
)
from tests.ops.cross_entropy_cases import (
    OPTIONS,
    SHAPES,
    KernelCase,
    check_kernel,
    check_kernel_far_into_the_softcap,
    check_kernel_on_bad_rows,
)
from tests.ops.fused_cases import Place
from tests.oracles import assert_close

TOKENS, WIDTH, WORDS = 63, 32, 101
DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
VARIANTS = {
    "plain": {},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "softcap and scale": {"softcap": 3.0, "logit_scale": 2.0},
    "num_items": {"num_items": 1000},
}
MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "all": lambda position: position < 0,
    "a third": lambda position: position % 3 > 0,
    "uneven": lambda position: ((position > 3) & (position < 40)) | (position == 45),
    "only the last": lambda position: position < TOKENS - 1,
}


def make_inputs(
    dtype: torch.dtype, mask: str = "uneven", *, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return hidden states, head weight, head bias (leaves) and labels."""
    hidden = torch.randn(TOKENS, WIDTH, dtype=dtype, device=device, requires_grad=True)
    weight = torch.randn(WORDS, WIDTH, dtype=dtype, device=device, requires_grad=True)
    bias = torch.randn(WORDS, dtype=dtype, device=device, requires_grad=True)
    labels = torch.randint(0, WORDS, (TOKENS,), device=device)
    labels[MASKS[mask](torch.arange(TOKENS, device=device))] = -100
    return hidden, weight, bias, labels


def check_against_fp64(
    dtype: torch.dtype,
    mask: str,
    options: dict[str, float],
    *,
    chunk_tokens: int = 7,
    device: str = "cpu",
    backend: str = "auto",
    cut_off: bool = False,
) -> None:
    """Check loss and gradients; `cut_off` if a gradient is not rounded but cut off to `dtype`."""
    hidden, weight, bias, labels = make_inputs(dtype, mask, device=device)
    loss = chunked_cross_entropy(
        hidden, weight, labels, head_bias=bias, chunk_tokens=chunk_tokens, backend=backend, **options
    )
    (3 * loss).backward()
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, bias)]
    expected = cross_entropy_reference(leaves[0], leaves[1], labels, head_bias=leaves[2], **options)
    (3 * expected).backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    # Rounded: the logits.
    assert_close("loss", expected, loss, dtype=dtype, roundings=1, reduction_length=WIDTH)
    for name, actual, leaf in zip(("hidden", "weight", "bias"), (hidden, weight, bias), leaves, strict=True):
        # Rounded: the logits, whose error the exponential magnifies by their size, their gradient, the result.
        spread = 1 if dtype == torch.float32 else WIDTH**0.5
        assert actual.grad.dtype == dtype
        roundings = 2 + spread + cut_off
        assert_close(name, leaf.grad, actual.grad, dtype=dtype, roundings=roundings, reduction_length=WORDS)


def check_padding(backend: str, device: str) -> None:
    """Untrained tokens among the trained change nothing, however many there are and however often the same."""
    hidden, weight, bias, labels = make_inputs(torch.float32, device=device)
    trained, untrained = find_trained_tokens(labels), (labels == -100).nonzero().squeeze(1)

    def call(indices: torch.Tensor, num_items: torch.Tensor | None) -> list[torch.Tensor]:
        loss = chunked_cross_entropy(
            hidden,
            weight,
            labels,
            head_bias=bias,
            softcap=3.0,
            num_items=num_items,
            trained=indices,
            chunk_tokens=7,
            backend=backend,
        )
        return [loss, *torch.autograd.grad(loss, (hidden, weight, bias))]

    # Also as many as there are tokens, and more.
    for num_items in (None, torch.tensor(50, device=device)):
        expected = call(trained, num_items)
        for num_spare in (5, untrained.numel(), TOKENS):
            spare = untrained[torch.randint(untrained.numel(), (num_spare,), device=device)]
            padded = torch.cat([trained, spare])
            padded = padded[torch.randperm(padded.numel(), device=device)]
            actual = call(padded, num_items)
            assert (actual[1][untrained] == 0).all()
            # Other chunks: sums of a chunk, and of chunks, in another order.
            for name, one, other in zip(("loss", "hidden", "weight", "bias"), expected, actual, strict=True):
                assert_close(name, one, other, dtype=torch.float32, reduction_length=WORDS)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("mask", MASKS)
def test_chunked_cross_entropy_matches_fp64(mask: str, options: dict[str, float]) -> None:
    check_against_fp64(torch.float32, mask, options)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_chunked_cross_entropy_matches_fp64_in_16_bits(dtype: torch.dtype, options: dict[str, float]) -> None:
    check_against_fp64(dtype, "uneven", options)


@pytest.mark.parametrize("block_tokens", [1, 5, 1000])
@pytest.mark.parametrize("chunk_tokens", [1, 2, 37, 38, 1000, "auto"])
def test_chunked_cross_entropy_does_not_depend_on_the_chunk(
    chunk_tokens: int, block_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy._Head, "_choose_block_tokens", lambda head: block_tokens)
    check_against_fp64(torch.float32, "uneven", {}, chunk_tokens=chunk_tokens)
    check_against_fp64(torch.bfloat16, "uneven", {"softcap": 3.0}, chunk_tokens=chunk_tokens)


def test_chunked_cross_entropy_believes_what_it_is_told_of_trained_tokens() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    trained = find_trained_tokens(labels)
    assert trained.tolist() == [i for i, label in enumerate(labels.tolist()) if label != -100]
    loss = chunked_cross_entropy(hidden, weight, labels, trained=trained)
    assert loss.equal(chunked_cross_entropy(hidden, weight, labels))


def test_chunked_cross_entropy_ignores_padding_of_the_trained_tokens() -> None:
    check_padding("torch", "cpu")


def test_chunked_cross_entropy_of_padding_alone_is_zero() -> None:
    hidden, weight, bias, labels = make_inputs(torch.float32)
    trained = torch.tensor([5, 5, 3])
    loss = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), trained=trained, head_bias=bias)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, (hidden, weight, bias)))


@pytest.mark.parametrize("all_tokens", [False, True])
def test_chunked_cross_entropy_asks_the_device_for_no_number(all_tokens: bool) -> None:
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal"), name
            if name.startswith("index"):
                indices = [t for arg in args[1:] if isinstance(arg, list | tuple) for t in arg if t is not None]
                assert all(t.dtype != torch.bool for t in indices)
            return func(*args, **kwargs or {})

    hidden, weight, bias, labels = make_inputs(torch.bfloat16)
    trained = torch.arange(TOKENS) if all_tokens else torch.cat([find_trained_tokens(labels), torch.tensor([5, 5])])
    num_items = torch.tensor(50)
    for items in (num_items, None):
        with Refuse():
            chunked_cross_entropy(
                hidden, weight, labels, trained=trained, num_items=items, head_bias=bias, softcap=3.0, chunk_tokens=7
            ).backward()
    with Refuse(), pytest.raises(AssertionError, match="nonzero"):
        chunked_cross_entropy(hidden, weight, labels, num_items=num_items)


def test_chunked_cross_entropy_refuses_a_backend_that_cannot_run() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    for call in (chunked_cross_entropy, chunked_token_losses):
        with pytest.raises(BackendError, match="no backend"):
            call(hidden, weight, labels, backend="cuda")
        with pytest.raises(BackendError, match="GPU"):
            call(hidden, weight, labels, backend="triton")
        with pytest.raises(BackendError, match="float64"):
            call(hidden.double(), weight.double(), labels, backend="triton")


def test_chunked_cross_entropy_passes_gradcheck() -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((9, 4), (11, 4), (11,))]
    labels = torch.tensor([3, -100, 0, 10, -100, -100, 3, 1, -100])

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        return chunked_cross_entropy(
            *inputs[:2], labels, head_bias=inputs[2], softcap=3.0, logit_scale=2.0, chunk_tokens=2
        )

    assert torch.autograd.gradcheck(call, leaves)


def test_chunked_cross_entropy_of_no_trained_token_is_zero() -> None:
    hidden, weight, bias, labels = make_inputs(torch.float32)
    for num_items in (None, 17):
        loss = chunked_cross_entropy(hidden, weight, torch.full_like(labels, -100), num_items=num_items, head_bias=bias)
        grads = torch.autograd.grad(loss, (hidden, weight, bias))
        assert loss.item() == 0
        assert [grad.shape for grad in grads] == [hidden.shape, weight.shape, bias.shape]
        assert all((grad == 0).all() for grad in grads)


def test_chunked_cross_entropy_of_micro_batches_adds_up() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32, "uneven")
    whole = chunked_cross_entropy(hidden, weight, labels)
    (expected,) = torch.autograd.grad(whole, hidden)
    num_items = int((labels != -100).sum())
    parts = [
        chunked_cross_entropy(h, weight, part, num_items=num_items, chunk_tokens=5)
        for h, part in zip(hidden.split(11), labels.split(11), strict=True)
    ]
    total = torch.stack(parts).sum()
    assert_close("loss", whole, total, dtype=torch.float32, reduction_length=TOKENS)
    (grad,) = torch.autograd.grad(total, hidden)
    assert_close("grad", expected, grad, dtype=torch.float32, reduction_length=WORDS)


def test_chunked_cross_entropy_accepts_a_tensor_of_items() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    loss = chunked_cross_entropy(hidden, weight, labels, num_items=torch.tensor(50))
    assert loss.equal(chunked_cross_entropy(hidden, weight, labels, num_items=50))


def test_chunked_cross_entropy_leaves_a_tied_head_alone() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    frozen = weight.detach()
    before = frozen.clone()
    chunked_cross_entropy(hidden, frozen, labels).backward()
    assert frozen.grad is None
    assert frozen.equal(before)
    embedded = torch.nn.functional.embedding(torch.arange(TOKENS), weight)
    chunked_cross_entropy(embedded, weight, labels).backward()
    leaf = weight.detach().double().requires_grad_()
    cross_entropy_reference(leaf[:TOKENS], leaf, labels).backward()
    assert_close("tied", leaf.grad, weight.grad, dtype=torch.float32, roundings=4, reduction_length=WORDS)


def test_chunked_cross_entropy_survives_extreme_logits() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32, "all")
    loss = chunked_cross_entropy(hidden * 1000, weight, labels)
    expected = cross_entropy_reference(hidden.double() * 1000, weight.double(), labels)
    assert_close("loss", expected, loss, dtype=torch.float32, roundings=4, reduction_length=WIDTH)
    loss.backward()
    assert torch.isfinite(hidden.grad).all()


def test_chunked_cross_entropy_keeps_fp16_gradients_normal() -> None:
    hidden, weight, _, labels = make_inputs(torch.float16)
    loss_scale, num_items = 65536, 1_000_000
    (chunked_cross_entropy(hidden, weight, labels, num_items=num_items) * loss_scale).backward()
    leaf = hidden.detach().double().requires_grad_()
    (cross_entropy_reference(leaf, weight.double(), labels, num_items=num_items) * loss_scale).backward()
    assert_close("grad", leaf.grad, hidden.grad, dtype=torch.float16, roundings=2 + WIDTH**0.5, reduction_length=WORDS)


def test_chunked_cross_entropy_without_grad_skips_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    expected = chunked_cross_entropy(hidden, weight, labels)

    def refuse(*_: object) -> None:
        raise AssertionError("a gradient was computed")

    monkeypatch.setattr(cross_entropy._Head, "multiply_back", refuse)
    monkeypatch.setattr(torch.Tensor, "scatter_add_", refuse)
    with torch.no_grad():
        assert chunked_cross_entropy(hidden, weight, labels).equal(expected)
    assert chunked_cross_entropy(hidden.detach(), weight.detach(), labels).equal(expected)


def test_chunked_cross_entropy_holds_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    empty = torch.empty

    def record(*size: int, **options: object) -> torch.Tensor:
        shapes.append(size)
        return empty(*size, **options)

    monkeypatch.setattr(cross_entropy.torch, "empty", record)
    monkeypatch.setattr(cross_entropy._Head, "_choose_block_tokens", lambda head: 4)
    hidden, weight, _, labels = make_inputs(torch.bfloat16, "all")
    chunked_cross_entropy(hidden, weight, labels, chunk_tokens=10, softcap=3.0)
    assert sorted(shapes) == [(4, WORDS), (4, WORDS), (9, WORDS)]


def test_chunked_cross_entropy_can_be_differentiated_again() -> None:
    hidden, weight, _, labels = make_inputs(torch.float32)
    loss = chunked_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0].clone()
    assert torch.autograd.grad(loss, hidden)[0].equal(first)


@pytest.mark.parametrize("options", [{}, {"softcap": 3.0, "logit_scale": 2.0}], ids=["plain", "softcap and scale"])
def test_chunked_token_losses_match_fp64(options: dict[str, float]) -> None:
    hidden, weight, bias, labels = make_inputs(torch.float32)
    losses = chunked_token_losses(hidden, weight, labels, chunk_tokens=7, head_bias=bias, **options)
    assert not losses.requires_grad
    for token in range(TOKENS):
        one = slice(token, token + 1)
        expected = cross_entropy_reference(
            hidden[one].double(), weight.double(), labels[one], head_bias=bias.double(), **options
        )
        assert_close(
            f"token {token}", expected, losses[token], dtype=torch.float32, roundings=8, reduction_length=WORDS
        )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@DTYPE
def test_chunked_cross_entropy_matches_fp64_on_a_gpu(
    dtype: torch.dtype, options: dict[str, float], backend: str
) -> None:
    check_against_fp64(dtype, "uneven", options, device="cuda", backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_chunked_cross_entropy_on_a_gpu_ignores_padding(backend: str) -> None:
    check_padding(backend, "cuda")


@pytest.mark.gpu
def test_chunked_cross_entropy_in_fp64_on_a_gpu_is_computed_by_torch() -> None:
    hidden, weight, _, labels = (t.double() if t.is_floating_point() else t for t in make_inputs(torch.float32))
    loss = chunked_cross_entropy(hidden.cuda(), weight.cuda(), labels.cuda())
    expected = cross_entropy_reference(hidden, weight, labels)
    torch.testing.assert_close(loss.cpu(), expected, rtol=64 * 2.0**-53, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_chunked_cross_entropy_on_a_gpu_can_be_captured(backend: str) -> None:
    hidden, weight, bias, labels = make_inputs(torch.bfloat16, "all", device="cuda")
    trained, num_items = torch.arange(30, device="cuda"), torch.tensor(30, device="cuda")

    def step() -> list[torch.Tensor]:
        loss = chunked_cross_entropy(
            hidden,
            weight,
            labels,
            head_bias=bias,
            trained=trained,
            num_items=num_items,
            chunk_tokens=7,
            backend=backend,
        )
        gradients = torch.autograd.grad(loss, (hidden, weight, bias))
        return [loss.detach(), *gradients]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    labels.copy_(torch.randint(0, WORDS, (TOKENS,), device="cuda"))
    labels[20:] = -100
    trained.copy_(torch.cat([torch.arange(20), torch.full((10,), 40)]))
    num_items.fill_(20)
    graph.replay()
    for name, expected, actual in zip(("loss", "hidden", "weight", "bias"), step(), captured, strict=True):
        assert_close(name, expected, actual, dtype=torch.bfloat16, roundings=1, reduction_length=WORDS)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@DTYPE
def test_cross_entropy_kernel_on_a_gpu_matches_fp64(dtype: torch.dtype, options: dict[str, float], bias: bool) -> None:
    place = Place("triton", "cuda")
    for shape in SHAPES:
        check_kernel(KernelCase(shape=shape, dtype=dtype, place=place, bias=bias, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [0.0, 1e4], ids=["equal", "large"])
@pytest.mark.parametrize("scale", [1.0, 0.3])
@DTYPE
def test_cross_entropy_kernel_on_a_gpu_matches_fp64_at_equal_and_large_logits(
    dtype: torch.dtype, scale: float, size: float
) -> None:
    for shape in SHAPES:
        check_kernel(KernelCase(shape=shape, dtype=dtype, place=Place("triton", "cuda"), size=size, scale=scale))


@pytest.mark.gpu
@pytest.mark.parametrize("words", [32000, 49152, 50257, 128256, 151936])
@pytest.mark.parametrize("spare", [0, 5])
@DTYPE
def test_cross_entropy_kernel_on_a_gpu_takes_vocabularies_of_models(dtype: torch.dtype, spare: int, words: int) -> None:
    place = Place("triton", "cuda", spare=spare)
    for launch in (CrossEntropyLaunch(), CrossEntropyLaunch(num_warps=32, accesses_per_thread=1)):
        check_kernel(KernelCase(shape=(9, words), dtype=dtype, place=place, launch=launch))


@pytest.mark.gpu
def test_cross_entropy_kernel_on_a_gpu_far_out() -> None:
    check_kernel_far_into_the_softcap(Place("triton", "cuda"))
    check_kernel_on_bad_rows(Place("triton", "cuda"))


@DTYPE
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("ids", [(5, 7), (WORDS, WORDS + 1), (3, WORDS)], ids=str)
def test_chunked_cross_entropy_takes_rows_of_its_own(ids: tuple[int, ...], mask: str, dtype: torch.dtype) -> None:
    vocabulary = max(WORDS, ids[-1] + 1)
    hidden, weight, _, labels = make_inputs(dtype, mask)
    weight.requires_grad_(False)
    labels = torch.where((labels >= 0) & (torch.arange(TOKENS) % 5 == 0), ids[-1], labels)
    rows = torch.randn(len(ids), WIDTH, requires_grad=True)
    own = OwnRows(ids_N=torch.tensor(ids), rows_ND=rows, vocabulary=vocabulary)
    loss = chunked_cross_entropy(hidden, weight, labels, own_rows=own, chunk_tokens=7)
    (3 * loss).backward()
    hidden64, rows64 = (t.detach().double().requires_grad_() for t in (hidden, rows))
    whole = torch.zeros(vocabulary, WIDTH, dtype=torch.float64)
    whole[:WORDS] = weight
    whole = whole.index_copy(0, torch.tensor(ids), rows64)
    (3 * cross_entropy_reference(hidden64, whole, labels)).backward()
    expected = cross_entropy_reference(hidden64, whole, labels)
    # Rows are rounded to the dtype of the hidden states, then product, gradient of it and sum with the other words'.
    limit = {"dtype": dtype, "roundings": 4, "reduction_length": vocabulary}
    assert_close("loss", expected, loss, **limit)
    assert hidden.grad is not None
    assert rows.grad is not None
    assert_close("hidden", hidden64.grad, hidden.grad, **limit)
    assert_close("rows", rows64.grad, rows.grad, **limit)
    losses = chunked_token_losses(hidden, weight, labels, own_rows=own, chunk_tokens=7)
    assert_close("token losses", expected * (labels >= 0).sum().clamp(min=1), losses.sum(), **limit)
