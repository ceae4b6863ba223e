"""A frozen weight made ready for a product lies in the shared buffer, or is the weight itself."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.dequantize_4bit import dequantize_4bit_reference
from halfbyte.ops.expand_weight import WEIGHT_BUFFER, expand_weight
from halfbyte.ops.quantize_4bit import quantize_4bit
from halfbyte.ops.workspace import Workspace
from halfbyte.quant import QuantSpec


def buffer_of(workspace: Workspace, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return workspace.take(WEIGHT_BUFFER, shape, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_expand_weight_dequantises_into_the_buffer(dtype: torch.dtype) -> None:
    q, workspace = quantize_4bit(torch.randn(48, 65), QuantSpec()), Workspace()
    weight = expand_weight(q, dtype=dtype, workspace=workspace)
    assert weight.equal(dequantize_4bit_reference(q, dtype=dtype))
    assert weight.data_ptr() == buffer_of(workspace, (48, 65), dtype).data_ptr()


def test_expand_weight_takes_a_plain_weight_as_it_is() -> None:
    plain, workspace = torch.nn.Parameter(torch.randn(48, 64)), Workspace()
    weight = expand_weight(plain, dtype=torch.float32, workspace=workspace)
    assert weight.data_ptr() == plain.data_ptr()
    assert not weight.requires_grad
    assert workspace.nbytes == 0


def test_expand_weight_casts_a_plain_weight_into_the_buffer() -> None:
    plain, workspace = torch.randn(48, 64, dtype=torch.bfloat16), Workspace()
    weight = expand_weight(plain, dtype=torch.float32, workspace=workspace)
    assert weight.equal(plain.float())
    assert weight.data_ptr() == buffer_of(workspace, (48, 64), torch.float32).data_ptr()


def test_expand_weight_shares_one_buffer_between_layers() -> None:
    workspace = Workspace()
    large, small = (quantize_4bit(torch.randn(size, 64), QuantSpec()) for size in (96, 32))
    expand_weight(large, dtype=torch.float32, workspace=workspace)
    held = workspace.nbytes
    expand_weight(small, dtype=torch.float32, workspace=workspace)
    assert workspace.nbytes == held
