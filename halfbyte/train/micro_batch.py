"""Loss and gradients of a micro-batch; on a GPU as one graph of kernels, launched at once.

A step of a small model, or of a large one on a fast card, waits for the host: some thousand kernels, each of which
takes Python and the driver longer to launch than the card to run. Where fused blocks compute a model, the kernels of a
micro-batch depend on its shape alone, so that they are recorded once and launched again with other numbers in the same
places, a CUDA graph. What changes from one micro-batch to the next is read from the device:

    tokens, labels, positions, document boundaries      copied into the recorded places
    which tokens are trained                            as indices, filled up with a token that is not
    trained tokens of the whole step                    one number
    dropout                                             one number that flips all seeds

Micro-batches of a shape share a graph: numbers of trained tokens are rounded up to eighths, numbers of documents to
powers of two, with empty documents at the end. A shape is recorded when it comes for the second time, until there are
MAX_GRAPHS; everything else is launched kernel by kernel, which computes the same.

Gradients are added to buffers that stay where they are, block by block. Graphs share one pool of memory; it is as
large as what the same micro-batch takes without. If both do not fit, a micro-batch without a graph lets the graphs go
first.

Of several ranks, the last micro-batch of a step tells their exchange what is complete while it computes on. A graph
records an event for each piece, behind which the piece is sent.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from halfbyte.device import free_bytes
from halfbyte.distributed import ALONE, World
from halfbyte.memory.block_streamer import BlockStreamer
from halfbyte.models.attention import PACKED_ATTENTION, DocumentLayout, has_varlen_attention
from halfbyte.models.card_split import is_divided
from halfbyte.models.fused_layers import (
    dropout_seeds_of,
    gradient_sums_of,
    has_fixed_angles,
    iter_fused_layers,
    offload_of,
)
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.packed_inputs import compute_dtype_of
from halfbyte.models.streaming import streamer_of
from halfbyte.nn import iter_trainable
from halfbyte.nn.convert import workspace_of
from halfbyte.nn.vocabulary import iter_token_rows
from halfbyte.ops.cross_entropy import IGNORED_LABEL
from halfbyte.train.batches import Batch, move_batch
from halfbyte.train.gradient_exchange import Completion, GradientExchange
from halfbyte.train.loss import LossPath

MAX_GRAPHS = 12
# Of a gradient's place in memory.
ALIGNMENT_BYTES = 256
MIN_DOCUMENTS = 16
TRAINED_STEPS = 8


@dataclasses.dataclass(frozen=True, slots=True)
class _Shape:
    """What a graph is made for."""

    rows: int
    tokens: int
    num_trained: int
    num_boundaries: int
    """0 where rows are whole documents."""


@dataclasses.dataclass(slots=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    inputs: Batch
    loss: torch.Tensor
    host_memory: tuple[torch.Tensor, ...]
    """Where the graph puts activations away."""
    completions: list[torch.cuda.Event]
    """Passed where pieces of the gradients are complete, the last ones first."""


class MicroBatches:
    """Computes the micro-batches of one training.

    Args:
        model: In the form in which it is trained.
        loss_path: How its loss is computed.
        as_graphs: Whether to record them where that is possible: fused blocks on a GPU, with our packed attention.
        world: Whose other ranks compute the other micro-batches of a step.
    """

    def __init__(self, model: PreTrainedModel, loss_path: LossPath, *, as_graphs: bool, world: World = ALONE) -> None:
        self.model, self.loss_path = model, loss_path
        self.device = compute_device_of(model)
        is_fused, on_gpu = any(True for _ in iter_fused_layers(model)), self.device.type == "cuda"
        self.why_no_graphs = "as set" if not as_graphs else self._why_no_graphs(is_fused=is_fused)
        """None where micro-batches are recorded; empty on a CPU, where there is nothing to record."""
        self.parameters = [parameter for _, parameter in iter_trainable(model)]
        # A base lies on one card.
        self.seeds = dropout_seeds_of(model) if is_fused and on_gpu and not is_divided(model) else None
        self.offload = offload_of(model) if is_fused else None
        self._base = torch.zeros(1, dtype=torch.int32, device=self.device)
        self._num_items = torch.ones((), device=self.device)
        self.exchange = GradientExchange(world)
        self._hooks: list[Any] = []
        self._seen: dict[_Shape, int] = {}
        self._graphs: dict[_Shape, _Recorded] = {}
        self._addresses: tuple[int, ...] = ()
        self._generation = -1
        self._pool_bytes = 0

    def _why_no_graphs(self, *, is_fused: bool) -> str | None:
        if self.device.type != "cuda":
            return ""
        streamer = self.streamer
        reasons = {
            "no fused blocks compute the model": not is_fused,
            "the model is on several cards": is_divided(self.model),
            "the loss takes whole logits": not self.loss_path.chunked,
            "attention is not our packed one": self.model.config._attn_implementation != PACKED_ATTENTION,
            # The host computes them from what the device holds.
            "angles depend on the length": not has_fixed_angles(self.model),
            # Their gradients have not been tried in a capture.
            "rows of single tokens are trained": any(True for _ in iter_token_rows(self.model)),
            # The host waits for the disk.
            "weights come from files": streamer is not None and streamer.reads_files,
        }
        return next((f"because {reason}" for reason, holds in reasons.items() if holds), None)

    @property
    def note(self) -> str:
        """How its kernels are launched, for people."""
        if self.why_no_graphs is None:
            return "kernels of a micro-batch: launched as one graph, from the second of each shape on"
        return f"kernels of a micro-batch: launched one by one, {self.why_no_graphs}" if self.why_no_graphs else ""

    @property
    def as_graphs(self) -> bool:
        """Whether micro-batches are recorded."""
        return self.why_no_graphs is None

    @property
    def streamer(self) -> BlockStreamer | None:
        """What brings weights to the device, if some live elsewhere by now."""
        return streamer_of(self.model)

    def run(
        self,
        batch: Mapping[str, Any],
        *,
        num_items: float | None,
        seed: int | None = None,
        factor: torch.Tensor | None = None,
        watch: Callable[[torch.Tensor], None] = lambda loss: None,
        is_last: bool = False,
    ) -> torch.Tensor:
        """Add the gradients of a micro-batch to those of the parameters, and return its loss.

        Args:
            batch: As the loader gives it.
            num_items: Trained tokens of the whole step.
            seed: Decides everything that is drawn at random; without it torch's generators go on from where they are.
            factor: Of the loss before its backward, for fp16, which is never recorded.
            watch: Is shown the loss, before the backward where there is no graph.
            is_last: Of this rank's in a step; `add_up` comes next.
        """
        if seed is not None:
            torch.manual_seed(seed)
        if self.seeds is not None:
            # Drawn on the host: nothing waits, and what is drawn does not depend on whether there is a graph.
            self._base.fill_(int(torch.randint(2**31, (), device="cpu")))
            self.seeds.start(self._base)
        if self.as_graphs or self.exchange.world.size > 1:
            self._place_gradients()
        if is_last:
            self.exchange.open()
        try:
            if not self.as_graphs or factor is not None or num_items is None:
                loss = self.loss_path(move_batch(batch, self.device), num_items=num_items)
                watch(loss)
                (loss if factor is None else loss * factor).backward()
                return loss.detach()
            self._num_items.fill_(num_items)
            loss = self._run_recorded(batch)
            watch(loss)
            return loss
        finally:
            if self.seeds is not None:
                self.seeds.start(None)

    def add_up(self) -> None:
        """Have the parameters' gradients be the sums of all ranks'; also where this one has computed none."""
        self._place_gradients()
        self.exchange.finish()

    def begin_anew(self) -> None:
        """Drop the gradients of a step, whose micro-batches will come again."""
        self.exchange.begin_anew()
        for parameter in self.parameters:
            parameter.grad = None

    def release(self) -> None:
        """Let all graphs go, their memory, the host memory of activations, and the slots of weights that visit."""
        self._release_graphs()
        while self._hooks:
            self._hooks.pop().remove()
        if self.offload is not None:
            self.offload.release()
        if self.streamer is not None:
            self.streamer.release()

    def _run_recorded(self, batch: Mapping[str, Any]) -> torch.Tensor:
        assert self.offload is not None
        self._forget_what_has_moved()
        padded = pad_micro_batch(batch)
        shape = _shape_of(padded)
        recorded = self._graphs.get(shape)
        if recorded is None:
            if len(self._graphs) == MAX_GRAPHS or not self._is_recordable(shape):
                self._seen[shape] = self.offload.num_releases
                self._make_room()
                loss = self.loss_path(move_batch(padded, self.device), num_items=self._num_items)
                loss.backward()
                self._forget_what_has_moved()
                return loss.detach()
            recorded = self._graphs[shape] = self._record(padded)
            assert self._generation == workspace_of(self.model).generation, "a buffer has grown while recording"
        for name, target in recorded.inputs.items():
            if isinstance(target, torch.Tensor):
                target.copy_(padded[name].pin_memory(), non_blocking=True)
        if self.streamer is not None:
            # What was fetched and never entered is waited for; afterwards the graph has filled the slots, and tells
            # nobody with what.
            self.streamer.forget()
        recorded.graph.replay()
        self.exchange.send_behind(recorded.completions)
        if self.streamer is not None:
            self.streamer.forget()
        return recorded.loss.clone()

    def _forget_what_has_moved(self) -> None:
        """Let graphs go whose scratch buffers have been replaced since, by larger ones in an evaluation, say."""
        generation = workspace_of(self.model).generation
        if generation != self._generation:
            self._release_graphs()
            self._generation = generation

    def _is_recordable(self, shape: _Shape) -> bool:
        """Say whether all memory that it needs is there, and nothing that the host plans depends on more than it."""
        if self.offload is None or self._seen.get(shape) != self.offload.num_releases:
            return False
        return not shape.num_boundaries or has_varlen_attention(self.model.config, compute_dtype_of(self.model))

    def _release_graphs(self) -> None:
        if self._graphs:
            self._graphs.clear()
            self._pool_bytes = 0
            torch.cuda.empty_cache()

    def _make_room(self) -> None:
        # What graphs have reserved and do not use at the moment counts as free, but is free to them alone.
        if self._graphs and free_bytes(self.device) < 2 * self._pool_bytes:
            self._release_graphs()

    def _record(self, padded: Batch) -> _Recorded:
        inputs = move_batch(padded, self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graph = torch.cuda.CUDAGraph()
        pool = next((recorded.graph.pool() for recorded in self._graphs.values()), None)
        assert self.seeds is not None
        assert self.offload is not None
        self.seeds.start(self._base)
        sums = gradient_sums_of(self.model)
        # A capture cannot wait for what was not captured: copies of an earlier pass that nobody has waited for.
        self.offload.join()
        if self.streamer is not None:
            self.streamer.forget()
        sums.targets = dict(zip(self.parameters, self.exchange.gradients, strict=True))
        completions: list[torch.cuda.Event] = []
        if self.exchange.pieces and has_external_events():
            sums.notice = self._note_in(completions)
        try:
            with torch.cuda.graph(graph, pool=pool):
                try:
                    loss = self._add_gradients(inputs)
                finally:
                    # A capture ends with one stream, also where memory runs out in it: whatever the copy streams still
                    # do is waited for.
                    self.offload.join()
                    if self.streamer is not None:
                        self.streamer.forget()
        finally:
            sums.clear()
        self._pool_bytes += max(torch.cuda.memory_reserved(self.device) - before, 0)
        return _Recorded(graph, inputs, loss.detach(), self.offload.host_memory, completions)

    def _note_in(self, completions: list[torch.cuda.Event]) -> Callable[[torch.nn.Parameter], None]:
        """Return what records an event where a piece of the gradients is complete, given their parameters in turn."""

        def record(piece: int) -> None:
            # One that is waited for outside of the graph that records it.
            event = torch.cuda.Event(external=True)
            event.record()
            completions.append(event)

        completion = Completion(self.exchange.pieces, record)
        number_of = {parameter: number for number, parameter in enumerate(self.parameters)}
        return lambda parameter: completion.see(number_of[parameter])

    def _add_gradients(self, inputs: Batch) -> torch.Tensor:
        """Compute a micro-batch without autograd's own sums, and return its loss."""
        loss = self.loss_path(inputs, num_items=self._num_items)
        gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        # Of parameters outside the blocks, which add theirs themselves.
        pairs = [(sum_, g) for sum_, g in zip(self.exchange.gradients, gradients, strict=True) if g is not None]
        if pairs:
            torch._foreach_add_([sum_ for sum_, _ in pairs], [g for _, g in pairs])
        return loss

    def _place_gradients(self) -> None:
        """Have gradients summed where graphs add to them, from zero where the optimizer has taken them away."""
        addresses = tuple(parameter.data_ptr() for parameter in self.parameters)
        if addresses != self._addresses:
            # Parameters have moved: what is recorded reads other memory.
            self._release_graphs()
            self._addresses = addresses
            self.exchange.lay(lay_side_by_side(self.parameters))
        if self.exchange.pieces and not self._hooks:
            self._hooks = [
                parameter.register_post_accumulate_grad_hook(functools.partial(self._see, number))
                for number, parameter in enumerate(self.parameters)
            ]
        gradients = self.exchange.gradients
        if all(p.grad is g for p, g in zip(self.parameters, gradients, strict=True)):
            return
        torch._foreach_zero_(gradients)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def _see(self, number: int, parameter: torch.Tensor) -> None:
        self.exchange.see(number)


def has_external_events() -> bool:
    """Say whether torch can wait outside of a graph for an event that the graph records: 2.8 and later."""
    return "external" in inspect.signature(torch.cuda.Event.__new__).parameters


def lay_side_by_side(parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return zeros like some tensors; in one stretch of memory, for ranks to add up, if dtype and device are one."""
    first = parameters[0]
    if any((parameter.dtype, parameter.device) != (first.dtype, first.device) for parameter in parameters):
        return [torch.zeros_like(parameter) for parameter in parameters]
    step = ALIGNMENT_BYTES // first.itemsize
    sizes = [-(-parameter.numel() // step) * step for parameter in parameters]
    pieces = first.new_zeros(sum(sizes)).split(sizes)
    return [piece[: one.numel()].view(one.shape) for piece, one in zip(pieces, parameters, strict=True)]


def pad_micro_batch(batch: Mapping[str, Any]) -> Batch:
    """Return a micro-batch with the numbers of trained tokens and of documents rounded up; the loss is the same.

    Args:
        batch: On the host; see `halfbyte.train.batches`.
    """
    padded = dict(batch)
    labels_T = batch["labels"].flatten()
    step = max(labels_T.numel() // TRAINED_STEPS, 1)
    trained = (labels_T != IGNORED_LABEL).nonzero().squeeze(1)
    wanted = min(-(-trained.numel() // step) * step, labels_T.numel())
    if wanted > trained.numel():
        other = (labels_T == IGNORED_LABEL).nonzero()[0]
        trained = torch.cat([trained, other.expand(wanted - trained.numel())])
    padded["trained"] = trained
    layout, boundaries = batch.get("document_layout"), batch.get("cu_seq_lens")
    if layout is not None and boundaries is not None and layout.runs != (tuple(batch["input_ids"].shape),):
        num_documents = max(MIN_DOCUMENTS, 1 << (boundaries.numel() - 2).bit_length())
        empty = boundaries[-1:].expand(num_documents + 1 - boundaries.numel())
        padded["cu_seq_lens"] = torch.cat([boundaries, empty])
        padded["document_layout"] = DocumentLayout(layout.runs, batch["input_ids"].shape[1], is_fixed=False)
    return padded


def _shape_of(padded: Mapping[str, Any]) -> _Shape:
    rows, tokens = padded["input_ids"].shape
    layout = padded.get("document_layout")
    is_fixed = layout is None or layout.is_fixed
    return _Shape(rows, tokens, padded["trained"].numel(), 0 if is_fixed else padded["cu_seq_lens"].numel())
