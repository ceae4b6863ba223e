"""The random number generators of a run, to be read and put back: python's, numpy's, torch's for CPU and GPU."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch

from halfbyte.errors import ConfigError


def read_random_state(device: torch.device) -> dict[str, Any]:
    """Return the state of every random number generator of a run on `device`, as plain numbers and tensors."""
    version, numbers, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=False)
    numpy_state["state"]["key"] = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    return {
        "python": [version, list(numbers), gauss],
        "numpy": numpy_state,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put every random number generator back.

    Raises:
        ConfigError: The run goes on on another kind of device, where dropout would draw other numbers.
    """
    if (state["cuda"] is not None) != (device.type == "cuda"):
        kind = "a CPU" if state["cuda"] is None else "a GPU"
        raise ConfigError(f"the checkpoint is of a run on {kind}; resume there, or start a new run from its adapter")
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    numpy_state = {**state["numpy"], "state": dict(state["numpy"]["state"])}
    numpy_state["state"]["key"] = numpy_state["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy_state)
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
