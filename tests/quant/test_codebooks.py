from __future__ import annotations

import pytest
import torch

from halfbyte.quant.codebooks import (
    code_pairs,
    codebook_values,
    dynamic_codes,
    dynamic_map,
    search_table,
    sorted_codes,
    thresholds,
)
from halfbyte.quant.tensor import CODEBOOKS

CODEBOOK = pytest.mark.parametrize("codebook", CODEBOOKS)


@CODEBOOK
def test_codebook_values_span_one(codebook: str) -> None:
    values = codebook_values(codebook)
    assert values.shape == (16,)
    assert values.min() == -1
    assert values.max() == 1
    assert 0 in values.tolist()


@CODEBOOK
def test_thresholds_lie_halfway_between_neighbours(codebook: str) -> None:
    ascending = codebook_values(codebook)[sorted_codes(codebook)].double()
    assert (ascending.diff() >= 0).all()
    midpoints = (ascending[:-1] + ascending[1:]) / 2
    assert ((thresholds(codebook).double() - midpoints).abs() <= midpoints.abs() * 2.0**-23).all()


def test_nf4_values_are_quantiles_of_a_normal_distribution() -> None:
    # Paper and bitsandbytes: quantiles at equal steps of probability on each side, scaled to [-1, 1].
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.9677083
    positive = normal.icdf(torch.linspace(offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(offset, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([negative, torch.zeros(1), positive.flip(0)])
    assert torch.allclose(codebook_values("nf4").double(), values / values.max(), rtol=0, atol=2e-7)


@CODEBOOK
def test_code_pairs_put_the_high_nibble_first(codebook: str) -> None:
    values = codebook_values(codebook)
    for byte in (0x00, 0x0F, 0xF0, 0x7A, 0xFF):
        assert torch.equal(code_pairs(codebook)[byte], torch.stack([values[byte >> 4], values[byte & 15]]))


@pytest.mark.parametrize(("codebook", "scale"), [("nf4", 15), ("nf4", 512), ("fp4", 512)])
def test_search_table_finds_the_place_that_counting_finds(codebook: str, scale: int) -> None:
    edges = thresholds(codebook)
    x = torch.cat([torch.linspace(-1, 1, 100_001), edges, torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1 + 2.0**-23])])
    for direction in (-9.0, 9.0):
        x = torch.cat([x, edges.nextafter(torch.full_like(edges, direction))])
    table = search_table(codebook, scale)
    bins = (x * scale + (scale + 0.5)).long()
    places = table.base[bins] + (x > table.threshold[bins])
    assert torch.equal(places.long(), (x[:, None] > edges).sum(dim=1))


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_ascends(signed: bool) -> None:
    values = dynamic_map(signed)
    assert values.shape == (256,)
    assert (values.diff() > 0).all()
    assert values[-1] == 1
    assert values[127 if signed else 0] == 0


def test_dynamic_codes_are_the_nearest_of_the_map() -> None:
    grid = torch.linspace(-1, 1, 65536, dtype=torch.float64)
    distance = (grid[:, None] - dynamic_map(True).double()).abs()
    taken = distance.gather(1, dynamic_codes().long()[:, None])[:, 0]
    assert (taken <= distance.amin(dim=1) + 1e-7).all()


def test_tables_are_usable_outside_the_inference_mode_they_were_made_in() -> None:
    codebook_values.cache_clear()
    with torch.inference_mode():
        values = codebook_values("nf4")
    assert not values.is_inference()


def test_tables_are_real_inside_a_context_of_another_default_device() -> None:
    for table in (codebook_values, thresholds, sorted_codes, code_pairs):
        table.cache_clear()
    dynamic_map.cache_clear()
    dynamic_codes.cache_clear()
    search_table.cache_clear()
    with torch.device("meta"):
        tables = [codebook_values("fp4"), thresholds("fp4"), sorted_codes("fp4"), code_pairs("fp4")]
        tables += [dynamic_map(True), dynamic_codes(), search_table("fp4", 512).base]
    assert all(table.device.type == "cpu" for table in tables)
