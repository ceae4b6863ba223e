"""AdamW with 8-bit or 32-bit moments in plain torch: blocked, with reused buffers. The path of the CPU.

Three things make the obvious loop over parameters slow. Twenty small calls for each of 450 adapters cost more than the
arithmetic; freshly allocated temporaries cost ten times what reused ones cost; and a barrier between threads after
each of those calls waits for whichever thread the system has put aside. So parameters are cut into pieces, pieces
are joined into chunks that fit one core's cache, and each thread takes its own chunks through its own scratch
buffers, with one barrier a step. A chunk is small enough that torch does not split its operations over threads.

A chunk's pieces belong to one parameter group and, normally, have taken equally many steps; where they have not (a
gradient was None once), the chunk is updated piece by piece.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from halfbyte.ops.adamw8bit import (
    BLOCK_SIZE,
    GRID_SCALE,
    AdamWOptions,
    AdamWState,
    StepControl,
    check_tensors,
    code_table,
)
from halfbyte.quant.codebooks import dynamic_map

# Up to this many elements torch runs an operation on the thread that calls it (its grain size); the scratch buffers
# are then 0.8 MB, about the second-level cache of one core.
CHUNK_NUMEL = 1 << 15


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """Elements `start` to `stop` of one tensor, `start` on a block boundary."""

    tensor: int
    start: int
    stop: int

    @property
    def num_blocks(self) -> int:
        return -((self.start - self.stop) // BLOCK_SIZE)


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive pieces of one group, in the order of the slab."""

    pieces: tuple[Piece, ...]
    group: int
    first_block: int

    @property
    def num_blocks(self) -> int:
        return sum(piece.num_blocks for piece in self.pieces)


class TorchStepper:
    """Updates the tensors of one state chunk by chunk."""

    def __init__(self, state: AdamWState) -> None:
        self.state = state
        self.steps = [0] * len(state.numels)
        self.num_threads = torch.get_num_threads() if state.device.type == "cpu" else 1
        chunks = make_chunks(state, chunk_numel=CHUNK_NUMEL)
        num_blocks = max((chunk.num_blocks for chunk in chunks), default=0)
        self.scratch = [Scratch(num_blocks, state.device) for _ in range(self.num_threads)]
        self.bound = [
            BoundChunk(chunk, state, self.scratch[number % self.num_threads]) for number, chunk in enumerate(chunks)
        ]

    def step_(
        self,
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor | None],
        *,
        groups: Sequence[AdamWOptions],
        control: StepControl,
    ) -> None:
        check_tensors(params, grads)
        if control.found_inf is not None and control.found_inf.item() != 0:
            return
        grad_scale = 1.0 if control.grad_scale is None else float(control.grad_scale.item())
        for tensor, grad in enumerate(grads):
            self.steps[tensor] += grad is not None

        # Gradients are switched off for each thread by itself.
        @torch.no_grad()
        def update_chunks_of(thread: int) -> None:
            for bound in self.bound[thread :: self.num_threads]:
                for part in self._uniform_parts(bound, grads):
                    part.load(params, grads, grad_scale=grad_scale)
                    part.update(groups[part.chunk.group], step=self.steps[part.chunk.pieces[0].tensor])
                    part.store(params)

        if self.num_threads == 1:
            update_chunks_of(0)
            return
        with ThreadPoolExecutor(self.num_threads) as pool:
            for _ in pool.map(update_chunks_of, range(self.num_threads)):
                pass

    def read_steps(self) -> list[int]:
        return list(self.steps)

    def write_steps(self, steps: Sequence[int]) -> None:
        self.steps = list(steps)

    def _uniform_parts(self, bound: BoundChunk, grads: Sequence[torch.Tensor | None]) -> list[BoundChunk]:
        """Return the chunk, or its pieces that have a gradient where not all have one and the same step count."""
        chunk = bound.chunk
        first = self.steps[chunk.pieces[0].tensor]
        if all(grads[p.tensor] is not None and self.steps[p.tensor] == first for p in chunk.pieces):
            return [bound]
        parts, block = [], chunk.first_block
        for piece in chunk.pieces:
            if grads[piece.tensor] is not None:
                parts.append(BoundChunk(Chunk((piece,), chunk.group, block), self.state, bound.scratch))
            block += piece.num_blocks
        return parts


class Scratch:
    """The buffers that the chunks of one thread share, and the tables of both maps.

    Args:
        num_blocks: Of the largest chunk.
        device: Of the tensors to update.
    """

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        def buffer(dtype: torch.dtype) -> torch.Tensor:
            return torch.empty(num_blocks, BLOCK_SIZE, dtype=dtype, device=device)

        self.param, self.grad, self.m, self.v, self.spare = (buffer(torch.float32) for _ in range(5))
        self.index = buffer(torch.int32)
        self.m_coder = Coder(signed=True, device=device)
        self.v_coder = Coder(signed=False, device=device)


class BoundChunk:
    """A chunk with its views of the slab and of the scratch buffers, made once."""

    def __init__(self, chunk: Chunk, state: AdamWState, scratch: Scratch) -> None:
        self.chunk = chunk
        self.scratch = scratch
        num_blocks, rows = chunk.num_blocks, slice(chunk.first_block, chunk.first_block + chunk.num_blocks)
        self.param, self.grad = scratch.param[:num_blocks], scratch.grad[:num_blocks]
        self.m, self.v, self.spare = scratch.m[:num_blocks], scratch.v[:num_blocks], scratch.spare[:num_blocks]
        self.index = scratch.index[:num_blocks]
        self.param_parts = _parts_of(self.param, chunk.pieces)
        self.grad_parts = _parts_of(self.grad, chunk.pieces)
        self.padding = _padding_of(self.m, chunk.pieces) + _padding_of(self.v, chunk.pieces)
        self.stored_m, self.stored_v = state.m[rows], state.v[rows]
        self.in_8bit = state.m_absmax is not None and state.v_absmax is not None
        if state.m_absmax is not None and state.v_absmax is not None:
            self.m_absmax, self.v_absmax = state.m_absmax[rows], state.v_absmax[rows]

    def load(self, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor | None], *, grad_scale: float) -> None:
        """Copy parameters and gradients to scratch, in fp32."""
        torch._foreach_copy_(self.param_parts, self._parts_in(params))
        torch._foreach_copy_(self.grad_parts, self._parts_in(grads))
        if grad_scale != 1.0:
            self.grad.div_(grad_scale)

    def update(self, options: AdamWOptions, *, step: int) -> None:
        """Compute the new parameters in scratch, and the new moments in the slab."""
        param, grad, spare = self.param, self.grad, self.spare
        c1, c2 = options.corrections(step)
        m, v = self.stored_m, self.stored_v
        if self.in_8bit:
            m, v = self.m, self.v
            self.scratch.m_coder.dequantize(self.stored_m, self.m_absmax, index=self.index, out=m)
            self.scratch.v_coder.dequantize(self.stored_v, self.v_absmax, index=self.index, out=v)
        m.mul_(options.beta1).add_(grad, alpha=1.0 - options.beta1)
        v.mul_(options.beta2).addcmul_(grad, grad, value=1.0 - options.beta2)
        torch.sqrt(v, out=spare)
        if options.weight_decay > 0.0:
            param.mul_(1.0 - options.lr * options.weight_decay)
        if self.in_8bit:
            param.addcdiv_(m, spare.div_(c2).add_(options.eps), value=-options.lr / c1)
            if self.padding:
                # Zero comes back as a little more than zero, which must not become a block's largest magnitude.
                torch._foreach_zero_(self.padding)
            self.scratch.m_coder.quantize(m, self.stored_m, self.m_absmax, index=self.index, spare=spare)
            self.scratch.v_coder.quantize(v, self.stored_v, self.v_absmax, index=self.index, spare=spare)
        else:
            torch.div(m, spare.add_(options.eps * c2), out=spare)
            param.add_(spare, alpha=-options.lr * c2 / c1)

    def store(self, params: Sequence[torch.Tensor]) -> None:
        """Copy the new parameters back, rounding to their dtype."""
        torch._foreach_copy_(self._parts_in(params), self.param_parts)

    def _parts_in(self, tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        parts = []
        for piece in self.chunk.pieces:
            tensor = tensors[piece.tensor]
            assert tensor is not None
            flat = tensor.reshape(-1)
            parts.append(flat if piece.stop - piece.start == flat.numel() else flat[piece.start : piece.stop])
        return parts


class Coder:
    """Both directions between fp32 and the codes of one map, in given buffers of [K, 256]."""

    def __init__(self, *, signed: bool, device: torch.device) -> None:
        self.values = dynamic_map(signed).to(device)
        self.codes = code_table(signed=signed).to(device)

    def dequantize(self, codes: torch.Tensor, absmax: torch.Tensor, *, index: torch.Tensor, out: torch.Tensor) -> None:
        """Restore fp32 values."""
        index.copy_(codes)
        torch.index_select(self.values, 0, index.view(-1), out=out.view(-1))
        out.mul_(absmax[:, None])

    def quantize(
        self, x: torch.Tensor, codes: torch.Tensor, absmax: torch.Tensor, *, index: torch.Tensor, spare: torch.Tensor
    ) -> None:
        """Write the codes and absmax of x, which is overwritten."""
        torch.amax(torch.abs(x, out=spare), dim=1, out=absmax)
        x.mul_(absmax.reciprocal()[:, None]).clamp_(-1.0, 1.0).add_(1.0)
        # An add with a factor is a fused multiply-add. Not a number becomes the smallest integer, and so code 0.
        index.copy_(spare.fill_(0.5).add_(x, alpha=GRID_SCALE)).clamp_(min=0)
        torch.index_select(self.codes, 0, index.view(-1), out=codes.view(-1))


def make_chunks(state: AdamWState, *, chunk_numel: int) -> list[Chunk]:
    """Cut the tensors of a state into pieces and join these into chunks.

    A chunk ends where it holds `chunk_numel` elements, padding included, or where the parameter group changes.
    """
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    room = chunk_numel

    def close() -> None:
        nonlocal room
        if pieces:
            head = pieces[0]
            first_block = state.first_block[head.tensor] + head.start // BLOCK_SIZE
            chunks.append(Chunk(tuple(pieces), state.group_of[head.tensor], first_block))
            pieces.clear()
        room = chunk_numel

    for tensor, numel in enumerate(state.numels):
        if pieces and state.group_of[pieces[0].tensor] != state.group_of[tensor]:
            close()
        start = 0
        while start < numel:
            piece = Piece(tensor, start, min(numel, start + room))
            pieces.append(piece)
            start = piece.stop
            room -= piece.num_blocks * BLOCK_SIZE
            if room == 0:
                close()
    close()
    return chunks


def _parts_of(buffer: torch.Tensor, pieces: tuple[Piece, ...]) -> list[torch.Tensor]:
    """Cut a scratch buffer [K, 256] into flat parts of the pieces' sizes, padding left out."""
    padded = buffer.view(-1).split_with_sizes([piece.num_blocks * BLOCK_SIZE for piece in pieces])
    return [part[: piece.stop - piece.start] for part, piece in zip(padded, pieces, strict=True)]


def _padding_of(buffer: torch.Tensor, pieces: tuple[Piece, ...]) -> list[torch.Tensor]:
    """Return the parts of a scratch buffer [K, 256] that belong to no piece."""
    padded = buffer.view(-1).split_with_sizes([piece.num_blocks * BLOCK_SIZE for piece in pieces])
    rests = [part[piece.stop - piece.start :] for part, piece in zip(padded, pieces, strict=True)]
    return [rest for rest in rests if rest.numel()]
