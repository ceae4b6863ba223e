"""How long a micro-batch takes, predicted from sizes and what a card can do.

A pass through the blocks takes, on the compute stream,

    products of frozen weights         2 T W operations forward, 2 T W backward, and those computed again by policy
    attention                          2 T L A forward, 2.5 times that backward, slower for short rows
    what is bound by memory            weights expanded to 16 bits, norms, rotations, SwiGLU, adapters, gradients
    launches                           a fixed time a block: some 90 kernels, each of which starts and ends

and beside it, on the link, each way on its own: slabs of weights that visit (both passes), activations that are put
away (out in the forward, back in the backward). A pass takes the longest of the three.

Gradients of several ranks are added up while the last backward of a step computes; what that takes longer is added.

Constants were fitted to an H100 SXM (torch 2.11, micro-batches as CUDA graphs, 2026-11-24). docs/memory.md has times as
predicted and as measured, which differ by 0.2 to 6.5%. Cards of that type differ by 9% among themselves.

An H200's times differ by up to 4.3% (2026-11-29). Other cards are scaled by their products, memory and link: a guess,
within a third or so.

T tokens, L tokens of a row, W linear weights of a block, A attention's width, D width, F feed-forward width.
"""

from __future__ import annotations

import dataclasses
import functools

from halfbyte.distributed.world import PIECE_BYTES
from halfbyte.memory.activation_policy import Policy
from halfbyte.memory.cards import Card
from halfbyte.memory.ledger import LedgerMaker
from halfbyte.memory.model_shape import ModelShape
from halfbyte.memory.run_shape import Choice, RunShape

# Share of the products' speed that attention reaches: PEAK L / (L + HALF), cuDNN on an H100 at 1024 and 8192 tokens.
ATTENTION_PEAK, ATTENTION_HALF_TOKENS = 0.69, 1157
ATTENTION_BACKWARD = 2.5
# Seconds a block takes beside that, in which kernels start and end.
LAUNCH_SECONDS_FORWARD, LAUNCH_SECONDS_BACKWARD = 1.1e-4, 2.2e-4
# Of the any-architecture path: seconds a block in which Python launches its kernels, and bytes moved, in those of a
# fused block.
GENERIC_LAUNCH_SECONDS_FORWARD, GENERIC_LAUNCH_SECONDS_BACKWARD = 4e-3, 6e-3
GENERIC_BYTES_FACTOR = 5.5
# Products in fp8, quantising included.
FP8_SPEEDUP = 1.31
# Passes over a hidden state outside the blocks: embedding, last norm and its gradient.
OUTER_PASSES = 30
# Passes over the logits of a token beside the two products.
LOGIT_PASSES = 3
# Of a disk, read in large pieces: an ordinary NVMe drive.
DISK_BYTES_PER_SECOND = 2.5e9
# Bytes a second of state in pinned host memory that an optimizer step reads and writes, one way.
PAGED_SHARE = 0.6


@dataclasses.dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of an optimizer step."""

    micro_batch_seconds: float
    num_micro_batches: int
    optimizer_seconds: float
    link_bound: bool
    """Whether copies between host and device decide, not computing."""

    @property
    def seconds(self) -> float:
        """Of the whole step."""
        return self.micro_batch_seconds * self.num_micro_batches + self.optimizer_seconds


@dataclasses.dataclass(frozen=True, slots=True)
class _Pass:
    """Seconds of a block in one direction."""

    forward: float
    backward: float


class CostModel:
    """Predicts step times of a run, for one choice after another.

    Args:
        ledgers: What knows the sizes of the run.
    """

    def __init__(self, ledgers: LedgerMaker) -> None:
        self.ledgers = ledgers
        self.shape: ModelShape = ledgers.shape
        self.run: RunShape = ledgers.run
        self.card: Card = ledgers.card
        # A plan asks for the same blocks many times.
        self._block = functools.cache(self._time_block)

    def predict(self, choice: Choice) -> StepTime:
        """Return the time of an optimizer step under a choice."""
        tokens = choice.rows * self.run.row_tokens
        forward = backward = put_away = 0.0
        for policy, count in choice.policies:
            one = self._block(policy, tokens)
            forward += count * one.forward
            backward += count * one.backward
            put_away += count * self.ledgers.sizes.kept_numbers(policy).host * self.run.compute_bytes * tokens
        link = self.card.link_gbps * 1e9
        visits = self._visits(choice) if self.card.is_gpu else 0.0
        out = put_away / link if self.card.is_gpu else 0.0
        # Only weights in host memory share their way with what is put away.
        back = visits + out if choice.home == "host" else max(visits, out)
        passes = max(forward, visits, out), max(backward, back)
        if not self.run.fused:
            # Each weight is fetched when it is expanded, and waited for.
            passes = forward + visits, backward + visits
        outer = self._outer(tokens)
        exchange = self._after_backward(passes[1], self.exchange_seconds)
        return StepTime(
            micro_batch_seconds=sum(passes) + outer,
            num_micro_batches=-(-self.run.batch_rows // choice.rows),
            optimizer_seconds=self._optimizer() + exchange,
            link_bound=sum(passes) > 1.02 * (forward + backward),
        )

    def _visits(self, choice: Choice) -> float:
        """Return the seconds in which all blocks that visit come once."""
        num_bytes = choice.streamed_blocks * self.ledgers.slab_bytes
        if choice.home == "files":
            return num_bytes / DISK_BYTES_PER_SECOND
        link = self.card.link_gbps * 1e9
        if choice.home == "host":
            return num_bytes / link
        others = 1 - 1 / self.run.host_ranks
        return others * num_bytes / (self.card.peer_gbps * 1e9 or link)

    @property
    def exchange_bytes(self) -> int:
        """What a rank sends, and receives, when the gradients of all are added up in a ring."""
        ranks = self.run.ranks
        return 2 * (ranks - 1) * 4 * self.ledgers.adapter_numbers // ranks

    @property
    def exchange_seconds(self) -> float:
        """Of that, whether or not something is computed meanwhile."""
        return self.exchange_bytes / (self.run.peer_gbps * 1e9)

    def _after_backward(self, backward: float, exchange: float) -> float:
        """Return what an exchange takes longer than the backward beside it: see `halfbyte.train.gradient_exchange`."""
        pieces = max(-(-4 * self.ledgers.adapter_numbers // PIECE_BYTES), 1)
        # The first piece is there after its share of the backward; the last one is sent when that has ended.
        return max(exchange / pieces, exchange - backward * (1 - 1 / pieces))

    def _time_block(self, policy: Policy, tokens: int) -> _Pass:
        shape, weights = self.shape, self.shape.block_weights
        products = self._products(weights, tokens)
        attention = self._attention(tokens)
        expanded = self._moved(weights * ((0.52 if self.run.in_4bit else 2) + self.run.compute_bytes))
        forward_numbers, backward_numbers = self._elementwise()
        itemsize = self.run.compute_bytes
        forward = products + attention + expanded + self._moved(forward_numbers * tokens * itemsize)
        backward = products + ATTENTION_BACKWARD * attention + expanded
        backward += self._moved(backward_numbers * tokens * itemsize)
        if self.run.dora:
            # See `dora_linear`: dropout takes a second product each way, the magnitude one in the backward.
            forward += self.run.drops * products
            backward += (1 + self.run.drops) * products
        again = 0.0
        if policy != "keep":
            shapes = shape.projection_shapes
            names = {"mlp": ("gate_proj", "up_proj"), "offload": ("gate_proj", "up_proj", "o_proj")}.get(
                policy, tuple(name for name in shapes if name != "down_proj")
            )
            part = sum(shapes[name][0] * shapes[name][1] for name in names) / max(shape.block_weights, 1)
            attends = policy in ("offload", "block")
            again = part * (products + self._moved(forward_numbers * tokens * itemsize)) + attends * attention
        if not self.card.is_gpu:
            return _Pass(forward, backward + again)
        if not self.run.fused:
            launches = GENERIC_LAUNCH_SECONDS_BACKWARD + (again > 0) * GENERIC_LAUNCH_SECONDS_FORWARD
            return _Pass(max(forward, GENERIC_LAUNCH_SECONDS_FORWARD), max(backward + again, launches))
        launches = LAUNCH_SECONDS_BACKWARD + (again > 0) * LAUNCH_SECONDS_FORWARD
        return _Pass(forward + LAUNCH_SECONDS_FORWARD, backward + again + launches)

    def _products(self, weights: int, tokens: int) -> float:
        speed = self.card.product_tflops * 1e12 * (FP8_SPEEDUP if self.run.fp8 else 1.0)
        return 2 * tokens * weights / speed

    def _attention(self, tokens: int) -> float:
        length = min(self.run.row_tokens, self.shape.window or self.run.row_tokens)
        share = ATTENTION_PEAK * length / (length + ATTENTION_HALF_TOKENS) if self.card.is_gpu else 1 / 3
        return 2 * tokens * length * self.shape.attention_width / (self.card.product_tflops * 1e12 * share)

    def _elementwise(self) -> tuple[float, float]:
        """Return how many numbers a token a block reads and writes outside products, forward and backward."""
        sizes = self.ledgers.sizes
        width, attention, ff_width = sizes.width, sizes.attention_width, sizes.ff_width
        turned = 2 * (sizes.qkv_width + sizes.normed_width)
        # Norms, residuals, heads turned and moved, SwiGLU; each input read once more by its adapter.
        forward = 9 * width + turned + 2 * attention + 3 * ff_width + (2 * width + attention + ff_width)
        # The same backward; gradients of outputs and inputs read for those of the adapters; inputs rebuilt.
        adapters = sizes.qkv_width + 2 * ff_width + 2 * width + (2 * width + attention + ff_width) * 2
        backward = 14 * width + 2 * turned + 3 * attention + 7 * ff_width + adapters
        share = 1.0 if self.run.fused else GENERIC_BYTES_FACTOR
        return share * forward, share * (backward + 2 * width * self.run.drops)

    def _outer(self, tokens: int) -> float:
        """Return the seconds of head, loss and last norm."""
        shape, itemsize = self.shape, self.run.compute_bytes
        products = 4 * tokens * shape.embedding_weights / (self.card.product_tflops * 1e12)
        passes = LOGIT_PASSES * shape.vocabulary + OUTER_PASSES * shape.width
        return products + self._moved(passes * tokens * itemsize)

    def _optimizer(self) -> float:
        numbers = self.ledgers.adapter_numbers
        state = numbers * self.run.state_bits / 4
        if self.run.pages_optimizer and self.card.is_gpu:
            return 12 * numbers / (self.card.memory_gbps * 1e9) + state / (PAGED_SHARE * self.card.link_gbps * 1e9)
        return self._moved(12 * numbers + 2 * state)

    def _moved(self, num_bytes: float) -> float:
        return num_bytes / (self.card.memory_gbps * 1e9)
