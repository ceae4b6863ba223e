"""gather_rows: rows by number, from the same device or from pinned host memory."""

from __future__ import annotations

import pytest
import torch

from halfbyte.memory.host_memory import allocate_pinned
from halfbyte.ops.gather_rows import gather_rows, gather_rows_reference

SHAPES = pytest.mark.parametrize(("ids_shape", "width"), [((3, 5), 6), ((1,), 2048), ((7, 1), 4104)])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@SHAPES
def test_rows_are_those_of_the_numbers(ids_shape: tuple[int, ...], width: int, dtype: torch.dtype) -> None:
    table_VD = torch.randn(40, width).to(dtype)
    ids_T = torch.randint(40, ids_shape)
    rows = gather_rows(ids_T, table_VD, dtype=torch.float32)
    assert torch.equal(rows, torch.nn.functional.embedding(ids_T, table_VD).float())


@pytest.mark.gpu
@DTYPES
@SHAPES
@pytest.mark.parametrize("pinned", [True, False])
def test_a_gpu_reads_rows_of_host_memory(
    pinned: bool, ids_shape: tuple[int, ...], width: int, dtype: torch.dtype
) -> None:
    table_VD = torch.randn(40, width).to(dtype)
    ids_T = torch.randint(40, ids_shape)
    home_VD = allocate_pinned(table_VD.nbytes).view(dtype).view(40, width) if pinned else table_VD.cuda()
    home_VD.copy_(table_VD)
    rows = gather_rows(ids_T.cuda(), home_VD, dtype=dtype)
    assert torch.equal(rows.cpu(), gather_rows_reference(ids_T, table_VD, dtype=dtype))
