"""What cards can do, as far as a plan must know: memory, speed of products, of memory, and of the link to the host.

The H100's and the H200's figures were measured by us (docs/memory.md). All others are the vendors' data sheets times
one share for products, one for memory and one for the link, those by which the H100 stays below its own data sheet;
they are a guess, and plans say so. Laptop variants run at whatever power the maker allows: a third less is not rare.
"""

from __future__ import annotations

import dataclasses
import re

from halfbyte.config.memory import is_size, parse_size
from halfbyte.errors import PlanError

GIB = 2**30
MIB = 2**20
# NVLink of data-centre cards, one way; bridges between other cards are not assumed.
PEER_GBPS = {"A100": 300.0, "H100 SXM": 450.0, "H200": 450.0, "B200": 900.0}
# Measured on an H100 SXM in training steps: 745 of 989 TFLOP/s, 2700 of 3350 GB/s, 54 of 64 GB/s.
PRODUCT_SHARE, MEMORY_SHARE, LINK_SHARE = 0.75, 0.8, 0.85
PCIE3, PCIE4, PCIE5 = 16.0, 32.0, 64.0
CONTEXT_BYTES = 520 * MIB
# torch's default: 32 MiB for a handle on a stream on Hopper, 8.1 elsewhere; two handles, with and without a graph.
CUBLAS_HOPPER_BYTES, CUBLAS_BYTES = 128 * MIB, 33 * MIB


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Where a model computes."""

    name: str
    memory_bytes: int
    """All of it; a desktop's screen takes some."""
    product_tflops: float
    """Dense products in 16 bits, as in training, not as in a data sheet."""
    memory_gbps: float
    """Bytes read and written a second, in 1e9."""
    link_gbps: float
    """The same between host and device, one way."""
    peer_gbps: float = 0.0
    """The same between two such cards of a host, one way; 0 where they reach each other through the host only."""
    has_bf16: bool = True
    has_fp8: bool = False
    is_measured: bool = False
    is_gpu: bool = True
    cublas_bytes: int = CUBLAS_BYTES
    context_bytes: int = CONTEXT_BYTES


def _sheet(
    name: str, gib: float, tflops: float, gbps: float, link: float, *, bf16: bool = True, fp8: bool = False
) -> Card:
    """Return a card from its data sheet: dense TFLOP/s in 16 bits with sums in fp32, GB/s of memory and link."""
    return Card(
        name=name,
        memory_bytes=int(gib * GIB),
        product_tflops=tflops * PRODUCT_SHARE,
        memory_gbps=gbps * MEMORY_SHARE,
        link_gbps=link * LINK_SHARE,
        peer_gbps=next((LINK_SHARE * gbps for card, gbps in PEER_GBPS.items() if name.startswith(card)), 0.0),
        has_bf16=bf16,
        has_fp8=fp8,
        cublas_bytes=CUBLAS_HOPPER_BYTES if name.startswith(("H100", "H200", "B200")) else CUBLAS_BYTES,
    )


H100 = Card(
    name="H100 SXM",
    memory_bytes=int(79.2 * GIB),
    product_tflops=745,
    memory_gbps=2700,
    link_gbps=54,
    # Of NVLink's data sheet: measured is the link to the host.
    peer_gbps=PEER_GBPS["H100 SXM"] * LINK_SHARE,
    has_fp8=True,
    is_measured=True,
    cublas_bytes=CUBLAS_HOPPER_BYTES,
)

# Ten plans' times within 4.3%. Its memory is half as fast again as the H100's, but products wait for the same power.
H200 = dataclasses.replace(
    H100,
    name="H200",
    memory_bytes=int(139.8 * GIB),
    product_tflops=690,
    memory_gbps=3300,
    peer_gbps=PEER_GBPS["H200"] * LINK_SHARE,
)

CARDS = (
    _sheet("RTX 3060 12GB", 12, 51, 360, PCIE4),
    _sheet("RTX 3060 Laptop", 6, 43, 336, PCIE4 / 2),
    _sheet("RTX 3070", 8, 81, 448, PCIE4),
    _sheet("RTX 3070 Laptop", 8, 64, 448, PCIE4 / 2),
    _sheet("RTX 3080", 10, 119, 760, PCIE4),
    _sheet("RTX 3080 Laptop", 16, 76, 448, PCIE4 / 2),
    _sheet("RTX 3090", 24, 71, 936, PCIE4),
    _sheet("RTX 4060", 8, 60, 272, PCIE4 / 2, fp8=True),
    _sheet("RTX 4060 Laptop", 8, 46, 256, PCIE4 / 2, fp8=True),
    _sheet("RTX 4060 Ti 16GB", 16, 88, 288, PCIE4 / 2, fp8=True),
    _sheet("RTX 4070", 12, 58, 504, PCIE4, fp8=True),
    _sheet("RTX 4070 Laptop", 8, 62, 256, PCIE4 / 2, fp8=True),
    _sheet("RTX 4080", 16, 97, 717, PCIE4, fp8=True),
    _sheet("RTX 4080 Laptop", 12, 76, 432, PCIE4, fp8=True),
    _sheet("RTX 4090", 24, 165, 1008, PCIE4, fp8=True),
    _sheet("RTX 4090 Laptop", 16, 99, 576, PCIE4, fp8=True),
    _sheet("RTX 5070", 12, 62, 672, PCIE5, fp8=True),
    _sheet("RTX 5080", 16, 113, 960, PCIE5, fp8=True),
    _sheet("RTX 5090", 32, 210, 1792, PCIE5, fp8=True),
    _sheet("RTX 5090 Laptop", 24, 95, 896, PCIE5, fp8=True),
    _sheet("T4", 15, 65, 320, PCIE3, bf16=False),
    _sheet("V100 16GB", 16, 125, 900, PCIE3, bf16=False),
    _sheet("V100 32GB", 32, 125, 900, PCIE3, bf16=False),
    _sheet("A10", 24, 125, 600, PCIE4),
    _sheet("RTX A4000", 16, 77, 448, PCIE4),
    _sheet("RTX A5000", 24, 111, 768, PCIE4),
    _sheet("RTX A6000", 48, 155, 768, PCIE4),
    _sheet("L4", 24, 121, 300, PCIE4, fp8=True),
    _sheet("L40S", 48, 362, 864, PCIE4, fp8=True),
    _sheet("A100 40GB", 40, 312, 1555, PCIE4),
    _sheet("A100 80GB", 80, 312, 2039, PCIE4),
    _sheet("H100 PCIe", 80, 756, 2000, PCIE5, fp8=True),
    H100,
    H200,
    _sheet("B200", 180, 2250, 8000, PCIE5, fp8=True),
)
# What a card of a bare size is taken to do: a modest one of its size.
SIZED = ((7, 40, 220, 13), (14, 45, 300, 20), (20, 70, 450, 20), (30, 100, 700, 25), (60, 120, 700, 25))
LARGEST_SIZED = (250, 1500, 25)
NOISE = re.compile(r"nvidia|geforce|tesla|quadro|generation|graphics|gpu|hbm\w*|sxm\d*|\bada\b|-|_|\(|\)")


def find_card(text: str) -> Card:
    """Return the card that a person means, by name ("RTX 4090", "4090", torch's own name) or size ("8GiB", "24GB").

    Raises:
        PlanError: No card is known by that name, or several are.
    """
    if is_size(text):
        return card_of_size(parse_size(text, option="--gpu"))
    wanted = _words(text)
    fitting = [card for card in CARDS if wanted and wanted <= _words(card.name)]
    exact = [card for card in fitting if _words(card.name) == wanted]
    within = [card for card in CARDS if _words(card.name) <= wanted]
    # "A100 SXM4 80GB" has more words than the table's name: the longest that it contains.
    longest = sorted(within, key=lambda card: -len(_words(card.name)))[:1]
    plain = [card for card in fitting if "laptop" not in _words(card.name)] or fitting
    for found in (exact, plain, longest):
        if len(found) == 1:
            return found[0]
    if plain:
        raise PlanError(f"--gpu {text}: which of {', '.join(card.name for card in plain)}?")
    raise PlanError(
        f"--gpu {text}: no such card is known. Name its memory (--gpu 24GiB), or one of "
        f"{', '.join(card.name for card in CARDS)}; or 'this' or 'cpu'"
    )


def card_of_size(num_bytes: int) -> Card:
    """Return a modest card with so much memory; its speed is a stated assumption, not a measurement."""
    tflops, gbps, link = next(
        ((speed, rate, bus) for limit, speed, rate, bus in SIZED if num_bytes < limit * GIB), LARGEST_SIZED
    )
    return Card(
        name=f"a card of {num_bytes / GIB:g} GiB",
        memory_bytes=num_bytes,
        product_tflops=tflops,
        memory_gbps=gbps,
        link_gbps=link,
    )


def cpu_of(*, host_bytes: int, cores: int, has_bf16: bool) -> Card:
    """Return a machine without a GPU. Speeds are those of server cores of 2023, by their number."""
    return Card(
        name=f"{cores} CPU cores",
        memory_bytes=host_bytes,
        product_tflops=cores * (0.45 if has_bf16 else 0.09),
        memory_gbps=min(10.0 * cores, 80.0),
        link_gbps=1.0,
        has_bf16=has_bf16,
        is_gpu=False,
        cublas_bytes=0,
        context_bytes=0,
    )


def _words(text: str) -> frozenset[str]:
    """Return what tells cards apart: "NVIDIA GeForce RTX 4090 Laptop GPU" is {4090, laptop}."""
    spaced = NOISE.sub(" ", text.lower())
    spaced = re.sub(r"\brtx(?=\d|\s*\d{4})|\brtx\b", " ", spaced)
    spaced = re.sub(r"(\d{4})(ti|super)\b", r"\1 \2", spaced)
    return frozenset(spaced.split())
