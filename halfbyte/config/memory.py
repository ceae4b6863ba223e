"""Options of memory: what a run may take, and where weights live. What is left out, the plan chooses."""

from __future__ import annotations

import dataclasses
import re

from halfbyte.config.option import option
from halfbyte.config.values import check_section
from halfbyte.errors import ConfigError

MIB, GIB, TIB = 2**20, 2**30, 2**40
UNITS = {"m": MIB, "mb": MIB, "mib": MIB, "g": GIB, "gb": GIB, "gib": GIB, "tb": TIB, "tib": TIB}
SIZE = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(UNITS)})")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MemorySection:
    """What the run may take of memory; halfbyte plan shows what follows"""

    gpu: str | None = option(None, decides_result=False)
    """Most that the run may take of the GPU, CUDA's own part included: 8GiB. none: what is free."""
    host: str | None = option(None, decides_result=False)
    """Most that it may take of host memory. none: what is free."""
    streamed_blocks: int | None = option(None, minimum=0, decides_result=False)
    """Decoder blocks whose 4-bit weights live in host memory and visit the GPU. none: as the plan has it."""
    spill_folder: str | None = option(None, decides_result=False)
    """Folder on a fast disk for weights that host memory has no room for. none: no weights in files."""
    sharded: bool | None = option(None, decides_result=False)
    """Divide those blocks among the cards of a host, which read them from each other. none: as the plan has it."""
    embedding_on_host: bool | None = option(None, decides_result=False)
    """Keep the embedding in host memory, of which the GPU reads the rows it needs. none: as the plan has it."""

    def __post_init__(self) -> None:
        check_section(self, "memory")
        for name in ("gpu", "host"):
            if (size := getattr(self, name)) is not None:
                parse_size(size, option=f"memory.{name}")

    @property
    def gpu_bytes(self) -> int | None:
        """`gpu` in bytes."""
        return None if self.gpu is None else parse_size(self.gpu, option="memory.gpu")

    @property
    def host_bytes(self) -> int | None:
        """`host` in bytes."""
        return None if self.host is None else parse_size(self.host, option="memory.host")


def parse_size(text: str, *, option: str) -> int:
    """Return the bytes that "8GiB", "24GB" or "500 MiB" mean; a GB of memory is 2^30 bytes, as its makers count.

    Raises:
        ConfigError: It is no size.
    """
    match = SIZE.fullmatch(text.strip().lower())
    if match is None or float(match[1]) <= 0:
        raise ConfigError(f"{option} is {text!r}; write a size such as 8GiB, 24GB or 512MiB")
    return int(float(match[1]) * UNITS[match[2]])


def is_size(text: str) -> bool:
    """Say whether a text is a number and a unit of memory."""
    return SIZE.fullmatch(text.strip().lower()) is not None
