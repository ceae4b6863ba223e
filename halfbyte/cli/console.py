"""Where the command line writes: results to stdout, progress to stderr, and other libraries' chatter nowhere."""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from halfbyte.device import ALLOCATOR_VARIABLES, EXPANDABLE_SEGMENTS

if TYPE_CHECKING:
    from rich.console import Console

CHATTY_LIBRARIES = r"(transformers|torch|accelerate|huggingface_hub|tensorboard|google|datasets)\b"


def quiet_libraries() -> None:
    """Keep libraries from writing hints for programmers between the lines meant for the person.

    Called when a command starts, never at import. Errors still come through, and an environment variable that the
    person has set wins.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # It tells of each try to reach the hub, with the whole address, be there a password in it.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", module=CHATTY_LIBRARIES)


def let_segments_grow() -> None:
    """Let torch's allocator on a GPU grow its segments, unless the person has set it up otherwise.

    With fixed ones up to a fifth more is reserved than used (docs/memory.md). torch reads this when it starts.
    """
    if sys.platform == "linux" and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[-1]] = EXPANDABLE_SEGMENTS


def progress_console(*, is_heard: bool = True) -> Console:
    """Return the console for progress: on stderr, so that results can be piped; of one rank among several."""
    from rich.console import Console

    return Console(stderr=True, highlight=False, quiet=not is_heard)


def result_console() -> Console:
    """Return the console for results: on stdout, coloured only on a terminal, lines never broken."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def json_text(record: Any) -> str:
    """Return a record as one line of JSON, which knows neither infinity nor NaN: they become null."""
    return json.dumps(_finite(record), ensure_ascii=False, allow_nan=False)


def printable(text: str) -> str:
    """Return text with control characters written out, so that none of a person's data commands the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
