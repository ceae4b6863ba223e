"""Pickled weights (`pytorch_model.bin`, `adapter_model.bin`), read without running what is inside.

A pickle is a program. torch's weights-only loader runs none of it beyond building tensors, and we read a pickle only
where a person named that very file.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch

from halfbyte.errors import FormatError


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickled state dict, mapped from the file where its container allows it.

    Raises:
        FormatError: The file is damaged, holds code, or holds anything but named tensors.
    """
    try:
        # Only the zip container (torch 1.6 and later) can be mapped.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error):
            raise FormatError(
                f"{path} is a pickle that holds code, not only weights; nothing of it was run. "
                "Convert it to safetensors where you trust it, or get the model from another place"
            ) from error
        raise FormatError(f"{path} is damaged: it cannot be unpickled ({error})") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read as pickled weights: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise FormatError(f"{path} holds something else than named tensors; expected a state dict")
    return state
