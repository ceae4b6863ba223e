"""manifest.json: size and checksum of every file of a checkpoint, so that a damaged one is known before it is used.

Disks lose blocks, copies break off and memory flips bits. A damaged file may still parse, and a run would go on from
it with no more sign than a worse result. So a checkpoint is read in full and compared before any of it is loaded.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST_FILE = "manifest.json"
_CHUNK_BYTES = 2**20


def write_manifest(folder: Path) -> None:
    """Write the manifest of the files that `folder` holds now."""
    files = {str(path.relative_to(folder)): _describe(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST_FILE).write_text(json.dumps({"files": files}, indent=1) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Say which file of a checkpoint is not as it was written, and how; None where all of them are."""
    path = folder / MANIFEST_FILE
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"].items()
    except FileNotFoundError:
        return f"{MANIFEST_FILE} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST_FILE} cannot be read"
    for name, expected in files:
        try:
            found = _describe(folder / name)
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != expected:
            return _difference(name, found, expected)
    return None


def _describe(path: Path) -> dict[str, Any]:
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return {"bytes": num_bytes, "sha256": digest.hexdigest()}


def _difference(name: str, found: dict[str, Any], expected: Any) -> str:
    expected_bytes = expected.get("bytes") if isinstance(expected, dict) else None
    if found["bytes"] != expected_bytes:
        return f"{name} has {found['bytes']:,} bytes instead of {expected_bytes}"
    return f"the checksum of {name} differs"
