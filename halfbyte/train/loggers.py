"""The loggers that `report_to` names, looked for before a run begins and not when it wants to write its first line."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable

from halfbyte.errors import ConfigError

# Packages whose names are not their loggers'.
PACKAGES = {"azure_ml": "azureml-core", "flyte": "flytekit"}
WORDS = ("all", "none")


def check_loggers(names: Iterable[str]) -> None:
    """Make sure that transformers has each of these loggers, and that its library is installed.

    Raises:
        ConfigError: One of them is unknown or not installed.
    """
    # TensorBoard comes with us; asking transformers about the others imports them.
    asked = [name for name in names if name not in WORDS and not _is_tensorboard(name)]
    if not asked:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    installed = {*get_available_reporting_integrations(), "flyte"}
    for name in asked:
        if name not in INTEGRATION_TO_CALLBACK:
            near = difflib.get_close_matches(name, INTEGRATION_TO_CALLBACK, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(INTEGRATION_TO_CALLBACK))}"
            raise ConfigError(f"report_to: no logger {name!r}; {hint}")
        if name not in installed:
            raise ConfigError(f"report_to: {name} is not installed; pip install {PACKAGES.get(name, name)}")


def _is_tensorboard(name: str) -> bool:
    return name == "tensorboard" and importlib.util.find_spec("tensorboard") is not None
