"""A LoraSpec that cannot be meant is refused."""

from __future__ import annotations

from typing import Any

import pytest

from halfbyte.errors import ConfigError
from halfbyte.nn import LoraSpec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"lora\.rank is 0"),
        ({"rank_pattern": {"q_proj": 0}}, r"lora\.rank_pattern\[q_proj\] is 0"),
        ({"dropout": 1.0}, r"lora\.dropout is 1\.0"),
        ({"dropout": -0.1}, r"lora\.dropout is -0\.1"),
        ({"targets": ()}, r"lora\.targets is empty"),
        ({"targets": ""}, r"lora\.targets is empty"),
        ({"targets": "q.*", "layers_to_transform": (0,)}, r"the regular expression 'q\.\*' can name the layers"),
        ({"layers_pattern": "layers"}, r"lora\.layers_pattern is set but"),
    ],
)
def test_lora_spec_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraSpec(**options)
