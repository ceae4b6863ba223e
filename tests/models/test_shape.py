from __future__ import annotations

import pytest
from transformers import PretrainedConfig

from halfbyte.errors import ConfigError
from halfbyte.memory.model_shape import ModelShape
from halfbyte.models.shape import shape_of
from tests.models.tiny import CONFIGS, DENSE, MIXTURES, build_tiny


@pytest.mark.parametrize("family", [*DENSE, *MIXTURES])
def test_every_weight_is_counted(family: str) -> None:
    model = build_tiny(family)
    shape = shape_of(CONFIGS[family], name=family)
    assert shape.num_parameters == pytest.approx(sum(p.numel() for p in model.parameters()), abs=shape.layers)


def test_configurations_that_tell_all_are_read_without_a_model() -> None:
    config = CONFIGS["llama"]
    assert shape_of(config, name="model") == ModelShape.from_config(config.to_dict())


def test_a_configuration_without_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match="lacks one of num_hidden_layers"):
        shape_of(PretrainedConfig(), name="model")
