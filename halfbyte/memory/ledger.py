"""Bytes of a training run by purpose, on the device and on the host; pure arithmetic.

What lives long is added up: frozen weights, embedding and head, adapters with gradients and optimizer state, buffers.
What comes and goes is largest at one of a few moments, and the ledger holds the largest: while the loss is computed, in
the backward of the last norm, or in the backward of the last block of a run of blocks that keep the same. At each of
them all blocks up to there hold what they keep.

Checked against what an H100 reserved (see tests/memory/measured_plans.json and docs/memory.md): reserved bytes are what
the allocator took from the driver, the CUDA context comes on top and has a row of its own.

B rows, T tokens of a micro-batch, D width, F feed-forward width, N query heads, R rank.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from halfbyte.memory.activation_policy import BlockSizes, Policy
from halfbyte.memory.cards import Card
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.run_shape import READ_BUFFERS, Choice, RunShape

MIB = 2**20
ABSMAX_GROUP = 256
SLAB_ALIGNMENT = 256
RANK_MULTIPLE = 16
STATE_BLOCK = 256
MIN_8BIT_NUMEL = 4096
SMALL_STATE_BYTES = 8
GPU_CHUNK_BYTES, CPU_CHUNK_BYTES, MIN_CHUNK_TOKENS = 2**27, 2**25, 128
GROUPS = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
# Backward of the library's norm of the last hidden states: six tensors in fp32.
NORM_NUMBERS_FP32 = 6
# While the loss is computed: hidden states before and after that norm, their gradients, and the norm's fp32 copy.
LOSS_TENSORS, LOSS_TENSORS_FP32 = 4, 1
# What the any-architecture path keeps of a block, in what a fused one keeps: 2.3 on Llama-7B, 2.6 on SmolLM2-135M.
GENERIC_SHARE = 2.4
# Static inputs of a graph, cosines and sines, and whatever is small.
SMALL_BYTES = 12 * MIB
# Pinned memory of activations comes in powers of two, see `activation_offload`.
PINNED_SHARE = 17 / 16
GPU_PROCESS_BYTES, CPU_PROCESS_BYTES = int(1.7 * 2**30), int(0.6 * 2**30)


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One row of a ledger."""

    purpose: str
    device_bytes: int
    host_bytes: int = 0
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Ledger:
    """All rows; the device's include the CUDA context."""

    entries: tuple[Entry, ...]
    context_bytes: int
    slack_bytes: int

    @property
    def device_bytes(self) -> int:
        """All that the card must have free."""
        return sum(entry.device_bytes for entry in self.entries)

    @property
    def reserved_bytes(self) -> int:
        """What torch reserves at its peak."""
        return self.device_bytes - self.context_bytes

    @property
    def allocated_bytes(self) -> int:
        """What of that is in use at the peak."""
        return self.reserved_bytes - self.slack_bytes

    @property
    def host_bytes(self) -> int:
        """All that the process needs of host memory."""
        return sum(entry.host_bytes for entry in self.entries)


class LedgerMaker:
    """Makes the ledgers of a run, for one choice after another; what depends on no choice is computed once.

    Args:
        shape: The model.
        run: What is asked for.
        card: Where it computes.
    """

    def __init__(self, shape: ModelShape, run: RunShape, card: Card) -> None:
        self.shape, self.run, self.card = shape, run, card
        self.sizes = BlockSizes.of(shape)
        self.codes_bytes, self.scales_bytes = block_weight_bytes(shape, run)
        self.slab_bytes = self.codes_bytes + self.scales_bytes
        self.ranks = {name: run.rank * len(set(members) & set(run.targets)) for name, members in GROUPS.items()}
        self.adapter_numbers = shape.layers * adapter_numbers(shape, run)
        # A plan asks for the same parts many times.
        self._buffers = functools.cache(self._list_buffers)
        self._activations = functools.cache(self._list_activations)
        self._adapters = functools.cache(self._list_adapters)

    def make(self, choice: Choice) -> Ledger:
        """Return the bytes of a choice."""
        tokens = choice.rows * self.run.row_tokens
        entries = [
            *self._weights(choice),
            *self._adapters(),
            *self._buffers(tokens),
            *self._activations(choice.policies, tokens),
        ]
        context = 0
        slack = 0
        if self.card.is_gpu:
            slack = self._slack(tokens)
            context = self.card.context_bytes
            entries += [
                Entry("cuBLAS workspaces and small things", self.card.cublas_bytes + SMALL_BYTES),
                Entry("allocator: reserved, not in use", slack),
                Entry("CUDA context", context, GPU_PROCESS_BYTES, "not in torch's figures"),
            ]
        else:
            entries.append(Entry("Python, torch and transformers", 0, CPU_PROCESS_BYTES))
        if not self.card.is_gpu:
            entries = [Entry(e.purpose, 0, e.device_bytes + e.host_bytes, e.note) for e in entries]
        return Ledger(tuple(entries), context, slack)

    def _weights(self, choice: Choice) -> list[Entry]:
        shape, itemsize = self.shape, self.run.compute_bytes
        resident = shape.layers - choice.streamed_blocks
        what = "4-bit weights" if self.run.in_4bit else "frozen weights"
        where = " on the device" if self.card.is_gpu else ""
        entries = [Entry(f"{what} of {resident} blocks{where}", resident * self.codes_bytes)]
        if self.scales_bytes:
            entries.append(Entry("their scales", resident * self.scales_bytes))
        if choice.streamed_blocks:
            entries += self._visitors(choice, what)
        embedding = shape.embedding_weights * itemsize
        on_host = embedding if choice.embedding_on_host else 0
        head = 0 if shape.ties_embedding else embedding
        name = "embedding, also output head" if shape.ties_embedding else "embedding and output head"
        entries.append(Entry(name, embedding - on_host + head, on_host))
        entries.append(Entry("norms and biases", (shape.norm_numbers + shape.other_numbers) * itemsize))
        return entries

    def _visitors(self, choice: Choice, what: str) -> list[Entry]:
        """Return the bytes of blocks that do not stay on every card: of their slots, and where they live."""
        count, sharers = choice.streamed_blocks, self.run.host_ranks
        if choice.home == "cards":
            # The first rank of a host has one more where they do not come out even.
            own = -(-count // sharers)
            slots = min(choice.slots, count - count // sharers)
            name = f"{what} of {own} blocks, this card's share of {count}"
            return [
                Entry(name, own * self.slab_bytes),
                Entry("slots for the others, which visit", slots * self.slab_bytes, 0, f"{slots} slots on the device"),
            ]
        slots = min(choice.slots, count)
        note = f"{slots} slots on the device"
        at_home = count
        if choice.home == "files":
            # Buffers are a rank's own; memory to be read from is there once for all of a host.
            at_home, sharers = min(READ_BUFFERS, count), 1
            note += f", {at_home} buffers on the host, the rest in files"
        note += f", one copy for {sharers} ranks" if sharers > 1 else ""
        name = f"{what} of {count} blocks that visit it"
        return [Entry(name, slots * self.slab_bytes, at_home * self.slab_bytes // sharers, note)]

    def _list_adapters(self) -> list[Entry]:
        numbers, shape, run = self.adapter_numbers, self.shape, self.run
        state = optimizer_bytes(shape, run)
        copies = 0
        if run.fused:
            widths = self._group_widths()
            for group, rank in self.ranks.items():
                out, in_ = widths[group]
                rank = self._padded(rank)
                copies += rank * (in_ + (0 if self._rides else out))
        pages = run.pages_optimizer and self.card.is_gpu
        first = [Entry("what adapters begin from (fp32)", 4 * numbers)] if run.keeps_first else []
        return [
            Entry("adapters (fp32)", 4 * numbers),
            *first,
            Entry("their gradients (fp32)", 4 * numbers),
            Entry(
                f"optimizer state ({run.state_bits} bits)",
                0 if pages else state,
                1 << (state - 1).bit_length() if pages else 0,
                "paged" if pages else "",
            ),
            Entry("copies of adapters in the compute dtype", copies * shape.layers * run.compute_bytes),
            *self._trained_words(pages),
            # Adapters and state are copied; then one after the other is made into the bytes of its file. The first rank
            # does it for all, out of the memory of which each is given its part.
            Entry(
                "a checkpoint on its way to the disk",
                0,
                (4 * numbers + state + max(4 * numbers, state)) // run.host_ranks,
            ),
        ]

    def _trained_words(self, pages: bool) -> list[Entry]:
        """Return what is trained of embedding and head: values and gradients in fp32, and the optimizer's state."""
        shape, run = self.shape, self.run
        entries = []
        if run.token_rows and len(run.trained_whole) < 2:
            matrices = 1 if shape.ties_embedding else 2 - len(run.trained_whole)
            numbers = run.token_rows * shape.width * matrices
            entries.append(Entry("rows of added tokens, in training", numbers * (8 + SMALL_STATE_BYTES)))
        if run.trained_whole:
            numbers = shape.embedding_weights * len(run.trained_whole)
            state = numbers * (SMALL_STATE_BYTES if run.state_bits == 32 else 2)
            # The loss sums the head's gradient in fp32, and casts the weight for its products.
            passing = shape.embedding_weights * (8 + run.compute_bytes) * ("lm_head" in run.trained_whole)
            entries.append(
                Entry(
                    f"{' and '.join(run.trained_whole)} trained whole",
                    8 * numbers + passing + (0 if pages else state),
                    state if pages else 0,
                )
            )
        return entries

    def _list_buffers(self, tokens: int) -> list[Entry]:
        """Return the reused buffers: one weight of a kind, a group's input and gradient."""
        itemsize, sizes = self.run.compute_bytes, self.sizes
        widths = self._group_widths()
        if not self.run.fused:
            largest = max(out * in_ for out, in_ in self.shape.projection_shapes.values())
            return [Entry("weights expanded for a product", largest * itemsize)]
        padded = {group: self._padded(rank) for group, rank in self.ranks.items()}
        ridden = {group: rank if self._rides else 0 for group, rank in padded.items()}
        area = {group: out * (in_ + ridden[group]) for group, (out, in_) in widths.items()}
        inputs = {group: in_ + ridden[group] for group, (_, in_) in widths.items()}
        entries = []
        if self.run.fp8:
            columns = {group: 3 * rank for group, rank in padded.items()}
            codes = max(out * (in_ + columns[group]) for group, (out, in_) in widths.items())
            codes_in = max(max(in_ + columns[group], out) for group, (out, in_) in widths.items())
            entries.append(Entry("weights expanded for a product (fp8)", codes + tokens * codes_in))
        else:
            expanded = area["gate_up"] + max(area["qkv"], area["down"]) + area["o"]
            entries.append(Entry("weights expanded for a product", expanded * itemsize))
        numbers = max(inputs.values()) + max(in_ for _, in_ in widths.values())
        if self.run.drops and any(self.ranks.values()):
            numbers += max(sizes.width, sizes.attention_width)
        return [*entries, Entry("a product's input and its gradient", numbers * tokens * itemsize)]

    def _list_activations(self, policies: tuple[tuple[Policy, int], ...], tokens: int) -> list[Entry]:
        """Return what is kept at the moment when most memory is in use, and what passes at that moment."""
        if not self.run.fused:
            return self._generic_activations(policies, tokens)
        itemsize = self.run.compute_bytes
        kept, host, lingering, peaks = 0, 0, 0, []
        for policy, count in policies:
            numbers = self.sizes.kept_numbers(policy)
            narrow = self._narrow_bytes(policy, tokens)
            kept += count * (numbers.device * itemsize * tokens + narrow)
            put_away = numbers.host * itemsize * tokens
            host += count * put_away
            # The last that was put away is still there when blocks follow that keep theirs.
            in_flight = put_away * min(count, 2) or lingering
            lingering = put_away or lingering
            passing = self.sizes.backward_numbers(policy, attention_scratch=self._attention_scratch) * itemsize * tokens
            peaks.append((kept, in_flight, passing, "a block's backward"))
        peaks.append((kept, lingering, self._loss_bytes(tokens), "the loss"))
        kept, in_flight, passing, when = max(peaks, key=lambda peak: sum(peak[:3]))
        entries = [Entry("activations kept", kept)]
        if host:
            name = "activations put away"
            entries.append(Entry(name, in_flight, int(host * PINNED_SHARE), "on the device: those on their way"))
        return [*entries, Entry(f"what passes at the peak, in {when}", passing)]

    def _generic_activations(self, policies: tuple[tuple[Policy, int], ...], tokens: int) -> list[Entry]:
        itemsize, layers = self.run.compute_bytes, self.shape.layers
        block = int(self.sizes.kept_numbers("keep").device * GENERIC_SHARE) * itemsize * tokens
        keeps = policies[0][0] == "keep"
        kept = layers * (block if keeps else self.sizes.width * itemsize * tokens)
        loss = self._loss_bytes(tokens)
        return [
            Entry("activations kept", kept),
            Entry("what passes at the peak, roughly", loss if keeps else max(block, loss)),
        ]

    def _loss_bytes(self, tokens: int) -> int:
        itemsize, width, vocabulary = self.run.compute_bytes, self.shape.width, self.shape.vocabulary
        budget = GPU_CHUNK_BYTES if self.card.is_gpu else CPU_CHUNK_BYTES
        chunk = max(MIN_CHUNK_TOKENS, budget // (itemsize * vocabulary))
        chunk = -(-tokens // -(-tokens // chunk))
        hidden = tokens * width
        loss = LOSS_TENSORS * hidden * itemsize + LOSS_TENSORS_FP32 * hidden * 4 + chunk * vocabulary * itemsize
        return max(loss, NORM_NUMBERS_FP32 * 4 * hidden)

    def _narrow_bytes(self, policy: Policy, tokens: int) -> int:
        """Return the bytes of what is as narrow as a rank, or one number a head or token."""
        itemsize, ranks = self.run.compute_bytes, {group: self._padded(rank) for group, rank in self.ranks.items()}
        if policy == "block":
            return tokens * itemsize * ranks["down"]
        if policy == "offload":
            return tokens * (itemsize * (ranks["down"] + ranks["qkv"]) + 4)
        heads = self.shape.query_heads + (self.shape.query_heads + self.shape.key_heads) * self.shape.has_head_norms
        return tokens * (itemsize * sum(ranks.values()) + 4 * (2 + heads))

    @property
    def _attention_scratch(self) -> int:
        # Kernels on a GPU sum the gradient of queries in fp32.
        return 2 * self.sizes.attention_width if self.card.is_gpu else 0

    def _slack(self, tokens: int) -> int:
        return slack_bytes(self.shape, self.run, tokens)

    @property
    def _rides(self) -> bool:
        return self.card.is_gpu and not self.run.fp8

    def _padded(self, rank: int) -> int:
        return -(-rank // RANK_MULTIPLE) * RANK_MULTIPLE if self.card.is_gpu else rank

    def _group_widths(self) -> dict[str, tuple[int, int]]:
        """Return (out, in) of each group of projections."""
        sizes = self.sizes
        return {
            "qkv": (sizes.qkv_width, sizes.width),
            "o": (sizes.width, sizes.attention_width),
            "gate_up": (2 * sizes.ff_width, sizes.width),
            "down": (sizes.width, sizes.ff_width),
        }


def block_weight_bytes(shape: ModelShape, run: RunShape) -> tuple[int, int]:
    """Return the bytes of a block's frozen weights: codes, or 16-bit numbers; and scales, as they lie in a slab."""
    if not run.in_4bit:
        return shape.block_weights * run.compute_bytes, 0
    codes = scales = 0
    others = [shape.other_linear_numbers] if shape.other_linear_numbers > 0 else []
    for numbers in [out * in_ for out, in_ in shape.projection_shapes.values()] + others:
        num_blocks = -(-numbers // run.block_size)
        codes += _aligned((numbers + 1) // 2)
        if run.double_quant:
            scales += _aligned(num_blocks) + _aligned(4 * -(-num_blocks // ABSMAX_GROUP)) + SLAB_ALIGNMENT
        else:
            scales += _aligned(4 * num_blocks)
    # A model with fewer linear weights than its sizes suggest.
    codes += min(shape.other_linear_numbers, 0) // 2
    return codes, scales


def adapter_numbers(shape: ModelShape, run: RunShape) -> int:
    """Return the trained numbers of a block's adapters."""
    return sum(numbers for name in run.targets for numbers in _adapter_tensors(shape, run, name))


def optimizer_bytes(shape: ModelShape, run: RunShape) -> int:
    """Return the bytes of both moments of all adapters."""
    total = 0
    for name in run.targets:
        for numbers in _adapter_tensors(shape, run, name):
            if run.state_bits == 8 and numbers >= MIN_8BIT_NUMEL:
                total += 2 * -(-numbers // STATE_BLOCK) * (STATE_BLOCK + 4)
            else:
                total += 2 * 4 * numbers
    return shape.layers * total


def _adapter_tensors(shape: ModelShape, run: RunShape, name: str) -> list[int]:
    """Return the sizes of the trained tensors of one projection: of A and B, and with DoRA of the magnitude."""
    out, in_ = shape.projection_shapes[name]
    return [run.rank * out, run.rank * in_, *([out] if run.dora else [])]


def slack_bytes(shape: ModelShape, run: RunShape, tokens: int) -> int:
    """Return what torch's allocator reserves and cannot fill, as measured.

    With segments that grow, 70 to 290 MiB on shapes of 135M to 65B: they grow by 20 MiB, each pool by itself. With
    fixed ones, 230 to 930 MiB, and more on shapes whose tensors fit badly into each other's places: 2.1 GiB on
    Qwen2.5-7B's, 3.9 on Qwen3-4B's.
    """
    hidden = tokens * shape.width * run.compute_bytes
    return 120 * MIB + 2 * hidden if run.expandable_segments else 224 * MIB + 8 * hidden


def _aligned(num_bytes: int) -> int:
    return math.ceil(num_bytes / SLAB_ALIGNMENT) * SLAB_ALIGNMENT
