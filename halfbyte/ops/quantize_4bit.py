"""Quantise a weight to 4 bits.

    absmax = max |w| over the block;  x = w * (1 / absmax);  code = sorted_codes[count(x > threshold)]

The arithmetic is fp32 whatever the dtype of the weight, each step rounded by itself, so that the bytes are the same
on every device and equal those of bitsandbytes. Its details are part of the format:

- The reciprocal is of max(absmax, 1e-38), so a block of zeros (or of numbers too small to matter) gives codes of 0.
- A last block that is short divides by absmax instead of multiplying by its reciprocal, and stores at least 1e-38.
- An odd number of elements leaves one nibble over; it holds the code of 0.
- A NaN or an infinity makes absmax, and so the whole block, NaN or infinite when restored: seen, not hidden.

Double quantisation keeps absmax in 8 bits: minus its mean, in groups of 256, against the signed dynamic map:

    offset = mean(absmax);  scale = max |absmax - offset| over the group
    code = dynamic_codes[trunc(fma((absmax - offset) / scale * 0.5 + 0.5, 65535, 0.5))]

Both levels equal bitsandbytes 0.50.2 on a CPU bit for bit, but for numbers that fall between its CPU and CUDA
thresholds (see `quant.codebooks`). Its CUDA kernels differ from its CPU path, hence from ours, in five more ways: an
all-zero NF4 block has codes 0 there, FP4's two zeros are swapped, the reciprocal is approximate, a short last block
uses it too, and the second level is searched in the map itself. `mean` is torch's on a CPU, as in bitsandbytes; its
order of summation, so the last bit of `offset` and what follows from it, is that of the number of threads. On a GPU
the kernel sums by itself, partly in fp64. The bytes of a block that holds a NaN or an infinity are unspecified.

On a CPU the weight passes through in chunks that fit the cores' caches, with buffers reused from chunk to chunk:
fresh memory costs ten times what reused memory does. Codes come from a search table (one lookup, one comparison)
because torch's bucketize takes 20 ns an element and fifteen comparisons 6, against 2 for this.

Source: QLoRA, arXiv 2305.14314, section 3.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch

from halfbyte.errors import ConfigError
from halfbyte.kernels import quantize_4bit as kernels
from halfbyte.ops.backend import resolve_backend
from halfbyte.quant.codebooks import dynamic_codes, search_table, sorted_codes, thresholds
from halfbyte.quant.tensor import ABSMAX_GROUP, QuantizedTensor, QuantSpec

SMALLEST_ABSMAX = 1e-38
# Torch runs an elementwise operation on one thread below this many elements (its grain size).
ELEMENTS_PER_THREAD = 1 << 15
# Bins of the search table a unit: FP4's smallest thresholds are 1/384 apart.
SEARCH_SCALE = 512
# Rows that a lookup is spread over; torch looks up each row on one thread.
LOOKUP_ROWS = 16


def quantize_4bit(weight: torch.Tensor, spec: QuantSpec, *, backend: str = "auto") -> QuantizedTensor:
    """Quantise a weight to 4 bits.

    Args:
        weight: Any shape, fp32, fp16 or bf16; not changed. Copied first where it is not contiguous.
        spec: How to quantise.
        backend: "auto" (by device), "torch" or "triton".

    Returns:
        The weight in 4 bits, on the weight's device.

    Raises:
        ConfigError: The weight is empty or of another dtype.
        BackendError: The backend is unknown or cannot run on the weight's device.
    """
    _check(weight)
    if resolve_backend("quantize_4bit", backend, weight.device) == "triton":
        return quantize_4bit_triton(weight, spec, launch=default_launch(spec))
    if weight.device.type == "cpu":
        return _quantize_cpu(weight, spec)
    return quantize_4bit_reference(weight, spec)


def quantize_4bit_reference(weight: torch.Tensor, spec: QuantSpec) -> QuantizedTensor:
    """Quantise a weight to 4 bits: the definition, in plain torch on any device."""
    _check(weight)
    flat = weight.detach().reshape(-1).float()
    padding = -flat.numel() % spec.block_size
    blocks = torch.nn.functional.pad(flat, (0, padding)).view(-1, spec.block_size)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=SMALLEST_ABSMAX))[:, None]
    if padding:
        absmax[-1].clamp_(min=SMALLEST_ABSMAX)
        scaled[-1] = blocks[-1] / absmax[-1]
    places = torch.bucketize(scaled.nan_to_num(nan=0.0), thresholds(spec.codebook, weight.device))
    codes = sorted_codes(spec.codebook, weight.device)[places.view(-1)].to(torch.uint8)
    codes = codes[: flat.numel() + flat.numel() % 2]
    packed = codes[0::2] << 4 | codes[1::2]
    if not spec.double_quant:
        return _record(weight, spec, packed, absmax)
    offset = absmax.mean()
    return _record(weight, spec, packed, *quantize_absmax_reference(absmax, offset), offset)


def quantize_absmax_reference(absmax: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise absmax to 8 bits: the definition, in plain torch on any device.

    Args:
        absmax: fp32 [blocks].
        offset: fp32 scalar, its mean.

    Returns:
        Codes, uint8 [blocks], and their scale, fp32 [ceil(blocks / 256)].
    """
    padding = -absmax.numel() % ABSMAX_GROUP
    groups = torch.nn.functional.pad(absmax - offset, (0, padding)).view(-1, ABSMAX_GROUP)
    scale = groups.abs().amax(dim=1)
    # A scale so small that its reciprocal overflows sends zeros to NaN, which bitsandbytes' table lookup reads as -1.
    scaled = (groups * scale.reciprocal()[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1)
    # 24 bits times 16 bits and a half are exact in fp64, so this is an fp32 fused multiply-add.
    index = (((scaled + 1.0) * 0.5).double() * 65535 + 0.5).float().long()
    codes = dynamic_codes(absmax.device)[index].where(scale[:, None] > 0, 0)
    return codes.view(-1)[: absmax.numel()].clone(), scale


def quantize_4bit_triton(weight: torch.Tensor, spec: QuantSpec, *, launch: kernels.QuantizeLaunch) -> QuantizedTensor:
    """Quantise a weight to 4 bits with the Triton kernels, launched as told. Nothing waits for the device."""
    flat = weight.detach().reshape(-1)
    packed = flat.new_empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = flat.new_empty(-(-flat.numel() // spec.block_size), dtype=torch.float32)
    tables = _kernel_tables(spec.codebook, weight.device)
    sums = None
    if spec.double_quant:
        sums = absmax.new_empty(kernels.num_programs(absmax.numel(), block_size=spec.block_size, launch=launch))
    kernels.quantize_4bit(flat, tables, packed, absmax, sums, block_size=spec.block_size, launch=launch)
    if sums is None:
        return _record(weight, spec, packed, absmax)
    return _record(weight, spec, packed, *_quantize_absmax_triton(absmax, sums))


def default_launch(spec: QuantSpec) -> kernels.QuantizeLaunch:
    """Return how `quantize_4bit` launches its kernel."""
    return kernels.QuantizeLaunch(search="bins" if spec.codebook == "nf4" else "tree")


def _check(weight: torch.Tensor) -> None:
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ConfigError(
            f"cannot quantise a weight of dtype {weight.dtype}; convert it to float32, float16 or bfloat16"
        )
    if weight.numel() == 0:
        raise ConfigError(f"cannot quantise an empty weight (shape {tuple(weight.shape)})")


def _record(
    weight: torch.Tensor,
    spec: QuantSpec,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    scale: torch.Tensor | None = None,
    offset: torch.Tensor | None = None,
) -> QuantizedTensor:
    return QuantizedTensor(
        packed=packed,
        absmax=absmax,
        absmax_scale=scale,
        absmax_offset=offset,
        codebook=spec.codebook,
        block_size=spec.block_size,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
    )


def _quantize_cpu(weight: torch.Tensor, spec: QuantSpec) -> QuantizedTensor:
    flat = weight.detach().reshape(-1)
    num_whole_blocks, rest = divmod(flat.numel(), spec.block_size)
    packed = flat.new_empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    absmax = flat.new_empty(num_whole_blocks + bool(rest), dtype=torch.float32)
    num_chunks = -(-flat.numel() // (ELEMENTS_PER_THREAD * torch.get_num_threads()))
    blocks_per_chunk = max(1, -(-num_whole_blocks // num_chunks))
    chunk = None
    for first in range(0, num_whole_blocks, blocks_per_chunk):
        last = min(first + blocks_per_chunk, num_whole_blocks)
        start, stop = first * spec.block_size, last * spec.block_size
        if chunk is None or last - first != chunk.num_blocks:
            chunk = _Chunk(last - first, spec)
        chunk.quantize(flat[start:stop], packed[start // 2 : stop // 2], absmax[first:last])
    if rest:
        single = dataclasses.replace(spec, double_quant=False)
        tail = quantize_4bit_reference(flat[-rest:], single)
        packed[-tail.packed.numel() :] = tail.packed
        absmax[-1:] = tail.absmax
    if not spec.double_quant:
        return _record(weight, spec, packed, absmax)
    offset = absmax.mean()
    return _record(weight, spec, packed, *_quantize_absmax_cpu(absmax, offset), offset)


class _Chunk:
    """The buffers that chunks of one size share, and the views of them, made once: a view costs a microsecond."""

    def __init__(self, num_blocks: int, spec: QuantSpec) -> None:
        numel = num_blocks * spec.block_size
        self.num_blocks = num_blocks
        self.table = search_table(spec.codebook, SEARCH_SCALE)
        self.half = torch.tensor(self.table.scale + 0.5, dtype=torch.float32, device="cpu")
        self.codes_by_place = None if spec.codebook == "nf4" else sorted_codes(spec.codebook)
        self.x = torch.empty(numel, dtype=torch.float32, device="cpu")
        self.y = torch.empty_like(self.x)
        self.index = torch.empty(numel, dtype=torch.int64, device="cpu")
        self.x_blocks = self.x.view(num_blocks, spec.block_size)
        self.y_blocks = self.y.view(num_blocks, spec.block_size)
        self.y_rows = self.y.view(LOOKUP_ROWS, -1)
        self.index_rows = self.index.view(LOOKUP_ROWS, -1)
        self.threshold_rows = self.table.threshold.expand(LOOKUP_ROWS, -1)
        self.base_rows = self.table.base.expand(LOOKUP_ROWS, -1)
        # Once the lookups are done, the memory of their index holds places and codes.
        self.places, spare = self.index.view(torch.int32).view(2, -1)
        self.codes, low = spare.view(torch.uint8)[: 2 * numel].view(2, -1)
        self.pairs, self.low = self.codes.view(torch.int16), low.view(torch.int16)

    def quantize(self, flat: torch.Tensor, packed: torch.Tensor, absmax: torch.Tensor) -> None:
        self.x.copy_(flat)
        torch.abs(self.x, out=self.y)
        torch.amax(self.y_blocks, dim=1, out=absmax)
        self.x_blocks.mul_(absmax.clamp(min=SMALLEST_ABSMAX).reciprocal_().unsqueeze(1))
        if not math.isfinite(absmax.sum().item()):
            self.x.nan_to_num_(nan=0.0)

        torch.add(self.half, self.x, alpha=self.table.scale, out=self.y)
        self.index.copy_(self.y)
        torch.gather(self.threshold_rows, 1, self.index_rows, out=self.y_rows)
        self.x.gt_(self.y)
        torch.gather(self.base_rows, 1, self.index_rows, out=self.y_rows)

        # By way of int32 twice as fast as from fp32 to bytes at once.
        self.places.copy_(self.y.add_(self.x))
        if self.codes_by_place is not None:
            self.places.copy_(self.codes_by_place[self.places])
        self.codes.copy_(self.places)
        # Pairs of codes as 16-bit numbers: arithmetic on these is vectorised, on every second byte it is not.
        torch.bitwise_right_shift(self.pairs, 8, out=self.low).add_(self.pairs, alpha=16)
        packed.copy_(self.low)


def _quantize_absmax_cpu(absmax: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    scale = absmax.new_empty(-(-absmax.numel() // ABSMAX_GROUP))
    for start in range(0, absmax.numel(), ELEMENTS_PER_THREAD):
        stop = start + ELEMENTS_PER_THREAD
        part = quantize_absmax_reference(absmax[start:stop], offset)
        codes[start:stop] = part[0]
        scale[start // ABSMAX_GROUP : stop // ABSMAX_GROUP] = part[1]
    return codes, scale


@functools.cache
def _kernel_tables(codebook: str, device: torch.device) -> kernels.Search:
    if codebook != "nf4":
        return kernels.Search(thresholds(codebook, device), sorted_codes(codebook, device), None, None)
    table = search_table(codebook, kernels.BIN_SCALE)
    base, threshold = (torch.nn.functional.pad(part, (0, 1)).to(device) for part in (table.base, table.threshold))
    return kernels.Search(thresholds(codebook, device), None, base.to(torch.int32), threshold)


def _quantize_absmax_triton(
    absmax: torch.Tensor, sums: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes = torch.empty_like(absmax, dtype=torch.uint8)
    scale = absmax.new_empty(-(-absmax.numel() // ABSMAX_GROUP))
    offset = absmax.new_empty(())
    kernels.quantize_absmax(absmax, sums, dynamic_codes(absmax.device), codes, scale, offset)
    return codes, scale, offset
