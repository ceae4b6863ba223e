"""A short hash that tells whether a base model is still the one that it was, without reading all of it.

Taken from config.json and, of each file of weights, its size, its header (names, dtypes, shapes and places of tensors)
and 4 KiB out of the middle of every tensor; files of up to 16 MiB are read whole. That is some hundred places of a few
KiB, so it takes milliseconds, also of 130 GB.

What it tells: another model, another release of it, weights that were trained on, merged, rounded or quantised anew, a
tensor that was exchanged: each changes nearly every byte of the tensors that it touches. What it does not: a change of
few bytes elsewhere in a tensor, such as an embedding with some rows written into in place, or a flipped bit. Those need
every byte read. Names and places of files do not count, so a model may be moved or downloaded anew; written in another
sharding it counts as changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from halfbyte.errors import FormatError
from halfbyte.models.gguf_file import GgufFile
from halfbyte.models.safetensors_file import load_header
from halfbyte.models.source import ModelSource, load_config_dict

WHOLE_BYTES = 2**24
SAMPLE_BYTES = 2**12
# Of a pickle, whose tensors nobody looks for before it is unpacked.
NUM_BLIND_SAMPLES = 1024
# Notes of whoever wrote config.json, which say nothing about the model.
_NOT_OF_THE_MODEL = ("_name_or_path", "transformers_version")


def fingerprint_base(source: ModelSource) -> str:
    """Return a short hash of configuration and weights, see above.

    Raises:
        FormatError: A file cannot be read.
    """
    digest = hashlib.sha256()
    if source.kind != "gguf":
        config = load_config_dict(source.folder)
        said = {name: value for name, value in config.items() if name not in _NOT_OF_THE_MODEL}
        digest.update(json.dumps(said, sort_keys=True).encode())
    for path in source.weight_files:
        try:
            for content in _samples(path, source.kind):
                digest.update(content)
        except OSError as error:
            raise FormatError(f"{path} cannot be read: {error.strerror or error}") from error
    return digest.hexdigest()[:16]


def _samples(path: Path, kind: str) -> Iterable[bytes]:
    file_bytes = path.stat().st_size
    yield file_bytes.to_bytes(8, "little")
    with path.open("rb") as file:
        if file_bytes <= WHOLE_BYTES:
            yield file.read()
            return
        tensors = _tensors(path, kind, file_bytes)
        yield file.read(min((offset for offset, _ in tensors), default=file_bytes))
        for offset, num_bytes in tensors:
            file.seek(offset + max(num_bytes - SAMPLE_BYTES, 0) // 2)
            yield file.read(min(num_bytes, SAMPLE_BYTES))


def _tensors(path: Path, kind: str, file_bytes: int) -> list[tuple[int, int]]:
    """Return offset and length of each tensor, or of equal parts of a file that does not say where its tensors are."""
    if kind == "gguf":
        return [(tensor.offset, tensor.num_bytes) for tensor in GgufFile(path).tensors.values()]
    if kind == "pickle":
        part_bytes = file_bytes // NUM_BLIND_SAMPLES
        return [(number * part_bytes, part_bytes) for number in range(NUM_BLIND_SAMPLES)]
    return [(entry.offset, entry.num_bytes) for entry in load_header(path).entries]
