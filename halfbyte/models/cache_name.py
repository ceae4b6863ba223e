"""The argument by which transformers' models and layers take their key-value cache.

Until 5.23 it is `past_key_values`; since 5.24 it is `cache`, and the old name warns. A layer that knows the other name
alone would compute each new token as if there were none before it.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

BEFORE, NOW = "past_key_values", "cache"


def cache_name(taker: Any) -> str:
    """Return what the forward of a class of transformers, or of an object of it, calls its cache."""
    return _name_of(taker if isinstance(taker, type) else type(taker))


@functools.cache
def _name_of(taker: Any) -> str:
    return NOW if NOW in inspect.signature(taker.forward).parameters else BEFORE
