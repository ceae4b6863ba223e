from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

from halfbyte.errors import ConfigError
from halfbyte.memory.model_shape import FUSABLE_TYPES, ModelShape
from halfbyte.models.build import build_meta_model
from halfbyte.models.fused_layers import LAYER_CLASSES, iter_decoder_layers
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


def test_fused_blocks_compute_what_plans_say_they_do() -> None:
    for model_type in FUSABLE_TYPES:
        model = build_meta_model(AutoConfig.for_model(model_type), dtype=torch.bfloat16)
        assert {type(layer).__name__ for layer in iter_decoder_layers(model)} <= set(LAYER_CLASSES)
    assert len(FUSABLE_TYPES) == len(LAYER_CLASSES)
