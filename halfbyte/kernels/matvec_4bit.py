"""Multiply a few tokens by a 4-bit weight on a GPU without writing the weight out: what decoding waits for.

    y[t, f] = sum_block absmax[f, block] * sum_(d in block) codebook[code[f, d]] * x[t, d]  (+ bias[f] + add[t, f])

A chunk is 32 weights of a row, four words of 32 bits: one 16-byte load of one thread, and within one block, whose
absmax multiplies the chunk's fp32 sum once. Sums stay with their thread until the end. Nothing is added atomically: the
same input gives the same bytes. Reading 0.5 bytes a weight, the work is as much in looking up codes as in memory: to
keep up with an H100's memory, a multiprocessor has to finish 25 weights a clock, with 128 instructions of lanes.

Two kernels. `rows`: a thread keeps its chunk of x in registers, in fp32, and takes it along ROWS rows; a step takes as
many chunks as the program has threads. The value of a code comes from

    codes     a load from a table of 16 values: one cache line, and an address to compute. For the interpreter
    shuffle   lane i of a warp holds value i % 16 and sends it to whoever asks: no address, and no mask, for a shuffle
              reads five bits and the table repeats after four
    permute   byte permutations of registers that hold the 16 values' top three bytes; the last byte repeats the third,
              so a value is within 2^-16 of the codebook's, relatively. No memory and no exchange, but the most integers

`tensor`, for x of 16 bits, is in matvec_4bit_tensor.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import torch

from halfbyte.kernels.launch import launch as launch_kernel
from halfbyte.kernels.matvec_4bit_tensor import mma_text, num_groups, tensor_kernel

WEIGHTS_PER_CHUNK = 32


@dataclasses.dataclass(frozen=True, slots=True)
class MatvecLaunch:
    """How the kernel is launched. Results differ by the order of fp32 sums, and by the lookup's 2^-16."""

    lookup: Literal["codes", "shuffle", "permute", "tensor"] = "shuffle"
    """Where the value of a code comes from. The interpreter knows codes alone; `tensor` takes x of 16 bits."""
    rows_per_program: int = 4
    """A power of two; 16 or 32 with `tensor`."""
    num_warps: int = 4
    prefetch: bool = False
    """Whether a step loads the next one's words before it works on its own, rather than after."""
    ask_first: bool = False
    """Whether a program first asks for all its words to come into the second-level cache."""


@dataclasses.dataclass(frozen=True, slots=True)
class MatvecWeight:
    """The tensors of a 4-bit weight, (out_features, in_features)."""

    packed: torch.Tensor
    absmax: torch.Tensor
    scale: torch.Tensor | None
    offset: torch.Tensor | None
    dynamic_map: torch.Tensor
    codebook: torch.Tensor
    planes: torch.Tensor
    block_size: int


def matvec_4bit(
    x: torch.Tensor,
    weight: MatvecWeight,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None,
    add: torch.Tensor | None,
    launch: MatvecLaunch,
) -> None:
    """Write the product to `out`.

    Args:
        x: (tokens, in_features), fp32, fp16 or bf16, contiguous, 16-byte aligned; in_features a multiple of block_size.
        weight: Its packed bytes 16-byte aligned.
        out: (tokens, out_features), contiguous, as are the two below.
        bias: (out_features,) or None.
        add: (tokens, out_features) or None.
        launch: How to launch.
    """
    num_rows, num_chunks = out.shape[1], x.shape[1] // WEIGHTS_PER_CHUNK
    is_tensor = launch.lookup == "tensor"
    if is_tensor:
        kernel = tensor_kernel(*_load_parts()[1:], *_sum_parts())
        more: dict[str, Any] = {"GROUPS": num_groups(x.shape[0], weight.block_size)}
    else:
        kernel, functions = _rows_kernel()
        more = {"EVEN": num_chunks % (32 * launch.num_warps) == 0, **functions}
    launch_kernel(
        kernel,
        -(-num_rows // launch.rows_per_program),
        x.view(-1).view(torch.int32),
        weight.packed.view(-1).view(torch.int32),
        weight.absmax,
        weight.absmax if weight.scale is None else weight.scale,
        weight.absmax if weight.offset is None else weight.offset,
        weight.dynamic_map,
        weight.planes if launch.lookup == "permute" else weight.codebook,
        out if bias is None else bias,
        out if add is None else add,
        out,
        num_rows,
        num_chunks,
        num_warps=launch.num_warps,
        LOOKUP=mma_text(x.dtype, x.shape[0], weight.block_size) if is_tensor else launch.lookup,
        X_DTYPE=_triton_dtype(x.dtype),
        TOKENS=x.shape[0],
        BIAS=bias is not None,
        ADD=add is not None,
        DOUBLE_QUANT=weight.scale is not None,
        CHUNKS_PER_BLOCK=weight.block_size // WEIGHTS_PER_CHUNK,
        ROWS=launch.rows_per_program,
        THREADS=32 * launch.num_warps,
        PREFETCH=launch.prefetch,
        ASK_FIRST=launch.ask_first,
        **more,
    )


def code_planes(codebook: torch.Tensor) -> torch.Tensor:
    """Return what `permute` looks up, int32 [12]: of 16 fp32 values the bytes 3, then 2, then 1, the closest to them.

    The value that comes out repeats byte 1 as byte 0.
    """
    bits = codebook.cpu().view(torch.int32).long() & 0xFFFFFFFF
    top = ((bits >> 8)[:, None] + torch.arange(-1, 2)).clamp_(min=0)
    best = ((top << 8 | top & 0xFF) - bits[:, None]).abs().argmin(dim=1, keepdim=True)
    top = top.gather(1, best).squeeze(1)
    planes = torch.stack([top >> 16, top >> 8, top]) & 0xFF
    return planes.to(torch.uint8).view(-1).view(torch.int32).to(codebook.device)


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def _shuffle_text() -> str:
    """Return the assembly that looks 8 codes up in a warp: outputs 0 to 7, the lane's value, the word."""
    # Of a byte's two codes the first is the high one.
    lines = (f"shr.u32 code, $9, {4 * (i ^ 1)}; shfl.sync.idx.b32 ${i}, $8, code, 31, -1;" for i in range(8))
    return "{ .reg .b32 code; " + " ".join(lines) + " }"


def _permute_text() -> str:
    """Return the assembly that looks 8 codes up by permuting bytes: outputs 0 to 7, 12 words of planes, the word.

    A permutation selects from eight bytes, so each plane takes one for codes below 8, one for the others, and one that
    takes byte i of the first or of the second, as selector i + 4 says for codes of 8 and more.
    """
    lines = [
        ".reg .b32 codes, which, below, above, top, middle, third, pair; and.b32 codes, $20, 0x77777777;",
        "shr.u32 which, $20, 1; lop3.b32 which, which, 0x44444444, 0x32103210, 0xEA;",
    ]
    for half in range(2):
        lines += ["shr.u32 codes, codes, 16; shr.u32 which, which, 16;"] * half
        for first, name in ((8, "top"), (12, "middle"), (16, "third")):
            lines += [
                f"prmt.b32 below, ${first}, ${first + 1}, codes; prmt.b32 above, ${first + 2}, ${first + 3}, codes;",
                f"prmt.b32 {name}, below, above, which;",
            ]
        for byte in range(2):
            # Bytes 0 and 1 of a pair are the low code's, the second in order; 2 and 3 the high code's.
            low, high = 2 * byte, 2 * byte + 1
            lines += [
                f"prmt.b32 pair, middle, top, 0x{high + 4}{high}{low + 4}{low};",
                f"prmt.b32 ${4 * half + low + 1}, pair, third, 0x10{low + 4}{low + 4};",
                f"prmt.b32 ${4 * half + low}, pair, third, 0x32{high + 4}{high + 4};",
            ]
    return "{ " + " ".join(lines) + " }"


@functools.cache
def _load_parts() -> Any:
    """Return how both kernels load: a thread's table, words into the cache, and scales of blocks."""
    import triton
    import triton.language as tl

    ask_text = tl.constexpr(
        "{ .reg .pred one; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 one, thread, 0; mov.b32 $0, 0; "
        "@one cp.async.bulk.prefetch.L2.global [$1], $2; }"
    )

    @triton.jit
    def _load_table(table_ptr, LOOKUP: tl.constexpr):
        if LOOKUP == "codes":
            return table_ptr
        elif LOOKUP == "permute":
            table = (tl.load(table_ptr),)
            for i in tl.static_range(1, 12):
                table += (tl.load(table_ptr + i),)  # type: ignore[assignment]
            return table
        else:
            lane = tl.inline_asm_elementwise("mov.u32 $0, %laneid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
            return tl.load(table_ptr + (lane & 15))

    @triton.jit
    def _ask_for(packed_ptr, first, num_rows, num_chunks, ROWS: tl.constexpr):
        """Have the words of a program's rows come into the second-level cache; one thread asks."""
        size = (tl.minimum(num_rows - first, ROWS) * num_chunks * 16).to(tl.int32)
        address = (packed_ptr + first * num_chunks * 4).to(tl.int64)
        tl.inline_asm_elementwise(ask_text, "=r,l,r", [address, size], dtype=tl.int32, is_pure=False, pack=1)

    @triton.jit
    def _load_absmax(absmax_ptr, scale_ptr, first, block, DOUBLE_QUANT: tl.constexpr):
        """Return the absmax of blocks `first + block`, a 64-bit number and small ones, and their groups' scales."""
        absmax = tl.load(absmax_ptr + first + block)
        if DOUBLE_QUANT:
            scale = tl.load(scale_ptr + (first >> 8) + (((first & 255).to(tl.int32) + block) >> 8))
        else:
            scale = absmax
        return absmax, scale

    @triton.jit
    def _decode_absmax(absmax, scale, offset, map_ptr, DOUBLE_QUANT: tl.constexpr):
        if DOUBLE_QUANT:
            absmax = tl.load(map_ptr + absmax.to(tl.int32)) * scale + offset
        return absmax

    return _load_table, _ask_for, _load_absmax, _decode_absmax


@functools.cache
def _sum_parts() -> Any:
    """Return what both kernels do with sums."""
    import triton
    import triton.language as tl

    @triton.jit
    def _stack(tensors, NUM: tl.constexpr):
        """Return a power of two of tensors as one, in a new last axis."""
        size: tl.constexpr = tensors[0].shape[0]
        for _ in tl.static_range(5):
            if len(tensors) > 1:
                stacked = (tl.join(tensors[0], tensors[len(tensors) // 2]),)
                for i in tl.static_range(1, len(tensors) // 2):
                    stacked += (tl.join(tensors[i], tensors[len(tensors) // 2 + i]),)  # type: ignore[assignment]
                tensors = stacked
        return tl.reshape(tensors[0], [size, NUM])

    @triton.jit
    def _store(y, token, row, mask, bias_ptr, add_ptr, out_ptr, num_rows, BIAS: tl.constexpr, ADD: tl.constexpr):
        out = token * num_rows + row
        if BIAS:
            y += tl.load(bias_ptr + row, mask=mask, other=0).to(tl.float32)
        if ADD:
            y += tl.load(add_ptr + out, mask=mask, other=0).to(tl.float32)
        tl.store(out_ptr + out, y.to(out_ptr.dtype.element_ty), mask=mask)

    return _stack, _store


@functools.cache
def _row_parts() -> Any:
    """Return what the kernel of rows is made of: x of a chunk, and a chunk's sum."""
    import triton
    import triton.language as tl

    load_text = tl.constexpr("ld.global.v4.b32 {$0, $1, $2, $3}, [$4];")
    shuffle_text, permute_text = tl.constexpr(_shuffle_text()), tl.constexpr(_permute_text())
    shuffle_takes = tl.constexpr("=&f," * 8 + "f,r")
    permute_takes = tl.constexpr("=&f," * 8 + "r," * 12 + "r")

    @triton.jit
    def _load_x(x_ptr, word, X_DTYPE: tl.constexpr, LOOKUP: tl.constexpr):
        """Return the 8 elements of x that belong to each word, in fp32."""
        QUADS: tl.constexpr = X_DTYPE.primitive_bitwidth // 16
        values = (tl.zeros(word.shape, tl.float32),)
        for i in tl.static_range(QUADS):
            address = x_ptr + (word * QUADS + i) * 4
            if LOOKUP == "codes":
                quad = (tl.load(address), tl.load(address + 1), tl.load(address + 2), tl.load(address + 3))
            else:
                quad = tl.inline_asm_elementwise(
                    load_text, "=r,=r,=r,=r,l", [address.to(tl.int64)], dtype=(tl.int32,) * 4, is_pure=False, pack=1
                )
            for j in tl.static_range(4):
                if QUADS == 2:
                    values += (quad[j].to(tl.float32, bitcast=True),)  # type: ignore[assignment]
                else:
                    for k in tl.static_range(2):
                        half = (quad[j] >> (16 * k)).to(tl.int16)
                        values += (half.to(X_DTYPE, bitcast=True).to(tl.float32),)  # type: ignore[assignment]
        return values[1:]

    @triton.jit
    def _chunk_sum(packed, table, x, LOOKUP: tl.constexpr):
        """Return each chunk's sum of products."""
        if LOOKUP == "shuffle":
            values = tl.inline_asm_elementwise(
                shuffle_text, shuffle_takes, [table, packed], dtype=(tl.float32,) * 8, is_pure=False, pack=1
            )
        elif LOOKUP == "permute":
            words = table + (packed,)  # noqa: RUF005
            values = tl.inline_asm_elementwise(
                permute_text, permute_takes, words, dtype=(tl.float32,) * 8, is_pure=True, pack=1
            )
        else:
            values = (tl.load(table + ((packed >> 4) & 15)),)
            for i in tl.static_range(1, 8):
                values += (tl.load(table + ((packed >> ((i ^ 1) * 4)) & 15)),)
        total = values[0] * x[0]
        for i in tl.static_range(1, 8):
            total = tl.fma(values[i], x[i], total)
        return tl.sum(total, axis=1)

    return _load_x, _chunk_sum


@functools.cache
def _row_step() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def _load_step(
        packed_ptr, absmax_ptr, scale_ptr, first, chunk, num_rows, num_chunks,
        LOAD_ABSMAX: tl.constexpr, DOUBLE_QUANT: tl.constexpr, CHUNKS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Return for each row a chunk's words, its block's absmax and that one's scale."""
        chunk = tl.minimum(chunk, num_chunks - 1)
        loaded = (first,) * ROWS
        for i in tl.static_range(ROWS):
            row = tl.minimum(first + i, num_rows - 1)
            packed = tl.load(packed_ptr + row * num_chunks * 4 + (chunk[:, None] * 4 + tl.arange(0, 4)[None, :]))
            first_block, block = row * (num_chunks // CHUNKS_PER_BLOCK), chunk // CHUNKS_PER_BLOCK
            absmax = LOAD_ABSMAX(absmax_ptr, scale_ptr, first_block, block, DOUBLE_QUANT)
            loaded += (packed, absmax[0], absmax[1])
        return loaded[ROWS:]

    return _load_step


@functools.cache
def _rows_kernel() -> tuple[Any, dict[str, Any]]:
    """Return the kernel and the functions it takes as arguments: the interpreter knows no names from around it."""
    import triton
    import triton.language as tl

    @triton.jit
    def _matvec_4bit_rows_kernel(
        x_ptr, packed_ptr, absmax_ptr, scale_ptr, offset_ptr, map_ptr, table_ptr, bias_ptr, add_ptr, out_ptr,
        num_rows, num_chunks,
        LOOKUP: tl.constexpr, X_DTYPE: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
        DOUBLE_QUANT: tl.constexpr, CHUNKS_PER_BLOCK: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
        PREFETCH: tl.constexpr, ASK_FIRST: tl.constexpr, EVEN: tl.constexpr, LOAD_TABLE: tl.constexpr,
        ASK_FOR: tl.constexpr, LOAD_STEP: tl.constexpr, LOAD_ABSMAX: tl.constexpr, DECODE_ABSMAX: tl.constexpr,
        LOAD_X: tl.constexpr, CHUNK_SUM: tl.constexpr, STACK: tl.constexpr, STORE: tl.constexpr,
    ):  # fmt: skip
        first = tl.program_id(0).to(tl.int64) * ROWS
        if ASK_FIRST:
            ASK_FOR(packed_ptr, first, num_rows, num_chunks, ROWS)
        table = LOAD_TABLE(table_ptr, LOOKUP)
        offset = tl.load(offset_ptr) if DOUBLE_QUANT else 0.0
        thread, row = tl.arange(0, THREADS), first + tl.arange(0, ROWS)
        sums = (tl.zeros([THREADS], tl.float32),) * (TOKENS * ROWS)
        loaded = LOAD_STEP(
            packed_ptr, absmax_ptr, scale_ptr, first, thread, num_rows, num_chunks,
            LOAD_ABSMAX, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
        )  # fmt: skip
        start = 0
        while start < num_chunks:
            chunk = tl.minimum(start + thread, num_chunks - 1)
            next_loaded = loaded
            # A branch, for without one the assembler moves these loads down to where registers are free.
            if PREFETCH and start + THREADS < num_chunks:
                next_loaded = LOAD_STEP(
                    packed_ptr, absmax_ptr, scale_ptr, first, start + THREADS + thread, num_rows, num_chunks,
                    LOAD_ABSMAX, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
                )  # fmt: skip
            new_sums = sums[:0]
            for token in tl.static_range(TOKENS):
                x = LOAD_X(x_ptr, (token * num_chunks + chunk)[:, None] * 4 + tl.arange(0, 4)[None, :], X_DTYPE, LOOKUP)
                for i in tl.static_range(ROWS):
                    absmax = DECODE_ABSMAX(loaded[3 * i + 1], loaded[3 * i + 2], offset, map_ptr, DOUBLE_QUANT)
                    part = CHUNK_SUM(loaded[3 * i], table, x, LOOKUP)
                    if not EVEN:
                        absmax = tl.where(start + thread < num_chunks, absmax, 0.0)
                    new_sums += (tl.fma(part, absmax, sums[token * ROWS + i]),)
            sums = new_sums
            start += THREADS
            if not PREFETCH:
                next_loaded = LOAD_STEP(
                    packed_ptr, absmax_ptr, scale_ptr, first, start + thread, num_rows, num_chunks,
                    LOAD_ABSMAX, DOUBLE_QUANT, CHUNKS_PER_BLOCK, ROWS,
                )  # fmt: skip
            loaded = next_loaded

        for token in tl.static_range(TOKENS):
            y = tl.sum(STACK(sums[token * ROWS : token * ROWS + ROWS], ROWS), axis=0)
            STORE(y, token, row, row < num_rows, bias_ptr, add_ptr, out_ptr, num_rows, BIAS, ADD)

    functions = (*_load_parts(), *_sum_parts(), *_row_parts(), _row_step())
    return _matvec_4bit_rows_kernel, {function.fn.__name__[1:].upper(): function for function in functions}
