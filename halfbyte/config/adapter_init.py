"""The ways in which an adapter can begin, by PEFT's names."""

from __future__ import annotations

import re

from halfbyte.errors import ConfigError

ZERO, LOFTQ = "zero", "loftq"
PISSA = re.compile(r"pissa(?:_niter_(?P<iterations>[1-9]\d*))?")


def check_init(init: str, loftq_iterations: int, *, dora: bool) -> None:
    """Make sure that an initialisation is known and goes with the rest.

    Raises:
        ConfigError: It does not.
    """
    if init not in (ZERO, LOFTQ) and not PISSA.fullmatch(init):
        raise ConfigError(
            f"lora.init is {init!r}; allowed: {ZERO}, pissa, pissa_niter_N (such as pissa_niter_16), {LOFTQ}"
        )
    if loftq_iterations != 1 and init != LOFTQ:
        raise ConfigError(
            f"lora.loftq_iterations is {loftq_iterations}, and lora.init is {init}; leave one of them out"
        )
    if dora and alters_base(init, loftq_iterations):
        raise ConfigError(
            f"lora.dora trains the lengths of the base's rows, and lora.init={init} leaves a base with other rows, so "
            "that no adapter for the plain base could be written; choose one of them"
        )


def begins_from_weights(init: str) -> bool:
    """Say whether an initialisation looks at the weights of the base."""
    return init != ZERO


def alters_base(init: str, loftq_iterations: int) -> bool:
    """Say whether the base of an adapter that begins so is another than the plain one."""
    return PISSA.fullmatch(init) is not None or (init == LOFTQ and loftq_iterations > 1)
