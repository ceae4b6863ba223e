from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from halfbyte.errors import FormatError
from halfbyte.models.load import load_model
from halfbyte.models.source import ModelSource
from halfbyte.models.staging import AHEAD_BYTES, SLOT_BYTES, iter_on_device
from halfbyte.models.weights import LazyTensor, iter_weights
from halfbyte.quant import QuantSpec
from tests.models.tiny import logits_of, save_tiny
from tests.oracles import assert_close


def lazy_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> list[LazyTensor]:
    path = folder / "x.safetensors"
    save_file(tensors, path)
    source = ModelSource(kind="safetensors", name="x", folder=folder, weight_files=(path,))
    return [tensor for _, tensor in iter_weights(source)]


def test_iter_on_device_gives_views_on_the_cpu(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(7).to(torch.bfloat16)}
    lazy = lazy_tensors(tmp_path, tensors)
    for tensor, value in zip(lazy, iter_on_device(lazy, torch.device("cpu")), strict=True):
        assert torch.equal(value, tensors[tensor.name])


@pytest.mark.gpu
def test_iter_on_device_gives_every_byte_on_the_gpu(tmp_path: Path) -> None:
    sizes = [1, 1000, SLOT_BYTES - 1, SLOT_BYTES, 3 * SLOT_BYTES + 5, AHEAD_BYTES // 2, AHEAD_BYTES + 7]
    tensors = {
        f"t{n}": torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
        for n, size in enumerate(sizes)
    }
    lazy = lazy_tensors(tmp_path, tensors)
    sums = []
    for tensor, value in zip(lazy, iter_on_device(lazy, torch.device("cuda")), strict=True):
        assert value.is_cuda
        # Work on the caller's stream while later tensors arrive.
        sums.append(value.long().cumsum(0)[-1])
        assert torch.equal(value.cpu(), tensors[tensor.name])
    assert [int(total) for total in sums] == [int(tensors[tensor.name].long().sum()) for tensor in lazy]


@pytest.mark.gpu
def test_iter_on_device_reports_a_file_that_shrinks(tmp_path: Path) -> None:
    lazy = lazy_tensors(tmp_path, {f"t{n}": torch.zeros(SLOT_BYTES, dtype=torch.uint8) for n in range(40)})
    path = tmp_path / "x.safetensors"
    path.write_bytes(path.read_bytes()[: 2 * SLOT_BYTES])
    with pytest.raises(FormatError, match="became shorter"):
        list(iter_on_device(lazy, torch.device("cuda")))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])
@pytest.mark.parametrize("quant", [QuantSpec(), QuantSpec(double_quant=False), None])
def test_load_model_is_the_same_on_the_gpu(tmp_path: Path, family: str, quant: QuantSpec | None) -> None:
    save_tiny(tmp_path, family, shard_size="60KB")
    on_cpu = load_model(tmp_path, quant=quant, compute_dtype="bfloat16", device="cpu").model
    on_gpu = load_model(tmp_path, quant=quant, compute_dtype="bfloat16", device="cuda").model
    state = on_gpu.state_dict()
    assert all(tensor.is_cuda or "quant" in name for name, tensor in state.items())
    for name, tensor in on_cpu.state_dict().items():
        if "nested_absmax" in name or "absmax" in name or "quant_state" in name:
            # The mean of absmax is summed in another order.
            continue
        assert torch.equal(state[name].cpu(), tensor), name
    ids = torch.randint(4, 96, (2, 12), device="cuda")
    with torch.no_grad():
        logits = on_gpu(input_ids=ids, use_cache=False).logits.cpu()
        expected = on_cpu(input_ids=ids.cpu(), use_cache=False).logits
    assert_close("logits", expected, logits, dtype=torch.bfloat16, roundings=16)


@pytest.mark.gpu
def test_load_model_takes_4bit_checkpoints_to_the_gpu(tmp_path: Path) -> None:
    from halfbyte.export import export_bnb4bit

    save_tiny(tmp_path / "base")
    export_bnb4bit(tmp_path / "base", tmp_path / "nf4", QuantSpec())
    on_cpu, on_gpu = (
        load_model(tmp_path / "nf4", quant=None, compute_dtype="bfloat16", device=device).model
        for device in ("cpu", "cuda")
    )
    state = on_gpu.state_dict()
    assert all(torch.equal(state[name].cpu(), tensor) for name, tensor in on_cpu.state_dict().items())
    assert torch.isfinite(logits_of(on_cpu)).all()
