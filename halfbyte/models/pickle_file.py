"""Pickled weights (`pytorch_model.bin`, `adapter_model.bin`), read without running what is inside.

A pickle is a program. torch's weights-only loader runs none of it beyond building tensors, and we read a pickle only
where a person named that very file.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import struct
import warnings
import zipfile
from pathlib import Path
from typing import IO

import torch

from halfbyte.errors import FormatError

# What torch's loader and the interpreter of pickles raise for bytes that make no sense.
_DAMAGED = (
    *(RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(OverflowError, MemoryError, struct.error, zipfile.BadZipFile),
)


# torch searches its own messages by expressions whose time grows with the square of a name: 45,000 characters, 9 s.
MAX_NAME_CHARACTERS = 1024
# Of a file in torch's older format, before the numbers: magic number, version, system, tensors, names of storages.
NUM_PICKLES = 5


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a pickled state dict, mapped from the file where its container allows it.

    Raises:
        FormatError: The file is damaged, holds code, or holds anything but named tensors.
    """
    try:
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            _check_container(path)
        else:
            with path.open("rb") as file:
                _check_names(file, path)
        # Only the zip container (torch 1.6 and later) can be mapped.
        with warnings.catch_warnings():
            # About protocols that torch does not write: such a file is read, or refused below.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error):
            raise FormatError(
                f"{path} is a pickle that holds code, not only weights; nothing of it was run. "
                "Convert it to safetensors where you trust it, or get the model from another place"
            ) from error
        raise FormatError(f"{path} is damaged: it cannot be unpickled ({error})") from error
    except _DAMAGED as error:
        raise FormatError(f"{path} cannot be read as pickled weights: {error!r}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items()
    ):
        raise FormatError(f"{path} holds something else than named tensors; expected a state dict")
    return state


def _check_container(path: Path) -> None:
    """Refuse a container whose parts are larger than they are in the file: torch packs nothing, a bomb does."""
    with zipfile.ZipFile(path) as container:
        packed = next((part for part in container.infolist() if _is_packed(part)), None)
        if packed is not None:
            raise FormatError(f"{path}: {packed.filename} is compressed, which torch.save does not do; save it again")
        for part in container.infolist():
            if part.filename.endswith("data.pkl"):
                with container.open(part) as file:
                    _check_names(file, path)


def _is_packed(part: zipfile.ZipInfo) -> bool:
    return part.compress_type != zipfile.ZIP_STORED or part.file_size != part.compress_size


def _check_names(file: IO[bytes], path: Path) -> None:
    """Refuse names of a length that no tensor or class has; nothing is unpickled for it."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    for _ in range(NUM_PICKLES):
        if file.tell() == size:
            return
        for _, argument, _ in pickletools.genops(file):
            if isinstance(argument, str) and len(argument) > MAX_NAME_CHARACTERS:
                raise FormatError(f"{path} is damaged: it holds a name of {len(argument)} characters")
