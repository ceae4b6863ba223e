from __future__ import annotations

import pytest

from halfbyte.errors import PlanError
from halfbyte.memory.cards import CARDS, find_card


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("4090 laptop", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("4060 Ti 16GB", "RTX 4060 Ti 16GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("Tesla T4", "T4"),
        ("NVIDIA L4", "L4"),
        ("L40S", "L40S"),
    ],
)
def test_cards_are_found_by_what_people_call_them(text: str, name: str) -> None:
    assert find_card(text).name == name


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.name)
def test_every_card_is_found_by_its_own_name(card: object) -> None:
    assert find_card(card.name) is card  # type: ignore[attr-defined]


@pytest.mark.parametrize(("text", "gib"), [("8GiB", 8), ("24GB", 24), ("12 gib", 12), ("512MiB", 0.5), ("6g", 6)])
def test_a_size_is_a_card_of_that_size(text: str, gib: float) -> None:
    assert find_card(text).memory_bytes == gib * 2**30
    assert not find_card(text).is_measured


@pytest.mark.parametrize(
    ("text", "message"), [("H900", "no such card"), ("A100", "which of A100"), ("", "no such card")]
)
def test_what_is_unclear_is_asked(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        find_card(text)
