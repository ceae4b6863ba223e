"""What an option may carry beside its type and default: a range, and other names it is known by.

An option is a dataclass field. Its type says what values it takes, its default what it is when nobody says, and the
string below it what it means; bounds and aliases go into the field's metadata, where validation, the command line,
the help text and the editor schema all find them.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def option(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    minimum: float | None = None,
    above: float | None = None,
    below: float | None = None,
    aliases: tuple[str, ...] = (),
    decides_result: bool = True,
) -> Any:
    """Declare a field with bounds, aliases, or without a say in what comes out.

    Args:
        default: The value when none is given.
        default_factory: Makes the default, where it is mutable.
        minimum: Smallest allowed value.
        above: The value must be larger than this.
        below: The value must be smaller than this.
        aliases: Other names accepted in a YAML file and on the command line.
        decides_result: Whether another value may lead to another adapter. Where not, a run may be continued with it.

    Returns:
        A dataclass field; typed Any so that it may stand as the default of any type.
    """
    bounds = {"minimum": minimum, "above": above, "below": below}
    metadata = {
        "bounds": {k: v for k, v in bounds.items() if v is not None},
        "aliases": aliases,
        "decides_result": decides_result,
    }
    if default_factory is not dataclasses.MISSING:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)
