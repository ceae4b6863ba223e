"""The Triton kernel that gathers rows under Triton's interpreter, in a process of its own."""

from __future__ import annotations

import pytest
import torch

from halfbyte.ops.gather_rows import gather_rows, gather_rows_reference


# The interpreter knows no bf16.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("ids_shape", "width"), [((3, 5), 6), ((1,), 2048), ((7, 1), 4104)])
def test_the_kernel_takes_the_same_rows(ids_shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    table_VD, ids_T = torch.randn(40, width).to(dtype), torch.randint(40, ids_shape)
    rows = gather_rows(ids_T, table_VD, dtype=dtype, backend="triton")
    assert torch.equal(rows, gather_rows_reference(ids_T, table_VD, dtype=dtype))
