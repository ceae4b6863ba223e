"""JSON files of a model folder, and the index of its shards: read, and trusted in nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from halfbyte.errors import FormatError

INDEX_FILE = "model.safetensors.index.json"
# File systems take names of 255 bytes.
MAX_NAME_CHARACTERS = 200
# One plain name: no folder, no `..`, nothing that a hub pattern or a shell would expand.
SHARD_NAME = re.compile(rf"(?!\.)[\w.+=@ -]{{1,{MAX_NAME_CHARACTERS}}}(?<=\.safetensors)", re.ASCII)


def shard_names(index_file: Path) -> list[str]:
    """Return the names of the files that an index of shards lists; a name is a file beside the index, never a path.

    Raises:
        FormatError: The index is damaged, or names something outside its folder.
    """
    index = load_json(index_file)
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict):
        raise FormatError(f"{index_file} has no weight_map")
    for key, name in places.items():
        if not isinstance(name, str) or SHARD_NAME.fullmatch(name) is None:
            shown = repr(name)[:MAX_NAME_CHARACTERS]
            raise FormatError(f"{index_file}: weight_map puts {key[:80]} into {shown}, no .safetensors file beside it")
    return sorted(set(places.values()))


def load_json(path: Path) -> Any:
    """Return what a JSON file holds, or raise a FormatError that names file and line."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path} is missing") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except RecursionError as error:
        raise FormatError(f"{path} is nested too deep to be read") from error
    # ValueError: bytes that are not UTF-8, numbers of thousands of digits.
    except (OSError, ValueError) as error:
        raise FormatError(f"{path} cannot be read: {error}") from error
