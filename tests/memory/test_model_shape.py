from __future__ import annotations

from typing import Any

import pytest

from halfbyte.errors import ConfigError
from halfbyte.memory.model_shape import ModelShape
from tests.memory.shapes import CONFIGS

LLAMA = CONFIGS["Llama-7B"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"hidden_size": None}, "hidden_size of its config.json is missing"),
        ({"num_hidden_layers": 0}, "num_hidden_layers of its config.json is 0"),
        ({"vocab_size": "many"}, "vocab_size of its config.json is 'many'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelShape.from_config(LLAMA | changes)


def test_the_language_model_of_a_larger_one_is_read() -> None:
    nested = {"model_type": "llava", "text_config": LLAMA}
    assert ModelShape.from_config(nested) == ModelShape.from_config(LLAMA)


def test_heads_may_be_wider_than_the_model_divided_by_them() -> None:
    shape = ModelShape.from_config(CONFIGS["Qwen3-4B"])
    assert shape.attention_width == 4096
    assert shape.qkv_width == (32 + 16) * 128
    assert shape.has_head_norms
