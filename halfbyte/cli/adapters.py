"""Further adapters beside the one of OUT: which they are, and which of them answers."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.tuned import TunedModel, TunedSource, find_tokenizer, find_tuned, load_tuned
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


@dataclasses.dataclass(slots=True)
class Voices:
    """One base, and the adapters that may answer on it, by name."""

    sources: dict[str, TunedSource]
    models: dict[str, TunedModel]
    """The same model each, with the tokenizer of the adapter."""
    current: str

    @property
    def source(self) -> TunedSource:
        """Of the adapter that answers."""
        return self.sources[self.current]

    @property
    def tuned(self) -> TunedModel:
        """Likewise."""
        return self.models[self.current]

    def switch(self, name: str) -> None:
        """Let another adapter answer.

        Raises:
            ConfigError: There is none of that name.
        """
        from halfbyte.nn import set_adapter

        if name not in self.models:
            raise ConfigError(f"there is no adapter named {name!r}; there are {', '.join(self.models)}")
        set_adapter(self.models[name].model, name)
        self.current = name


def add_adapter_argument(parser: CommandParser) -> None:
    """Declare --adapter."""
    parser.add_argument(
        "--adapter",
        metavar="[NAME=]FOLDER",
        action="append",
        default=[],
        help="another run or adapter on the same base, may be given several times",
    )


def find_voices(args: argparse.Namespace) -> dict[str, TunedSource]:
    """Return what OUT and each --adapter is, by name: that of the folder unless another is given.

    Where OUT is a model without an adapter, its weights are held as the run of the first --adapter held them.

    Raises:
        ConfigError: Names that are not unlike, or adapters of another base.
    """
    first = find_tuned(args.tuned, args.overrides)
    folders = [_named(text) for text in args.adapter]
    sources = {} if folders and first.adapter is None else {_name_of(args.tuned): first}
    for name, folder in folders:
        given = dict(args.overrides) if sources else {"model.path": args.tuned} | dict(args.overrides)
        source = find_tuned(folder, given)
        if source.adapter is None:
            raise ConfigError(f"--adapter {folder}: there is no adapter")
        if name in sources:
            raise ConfigError(f"--adapter: two are named {name!r}; write one as other={folder}")
        base, main = find_tuned(folder, {}).config.model.path, first.config.model.path
        if Path(base).name != Path(main).name:
            raise ConfigError(f"--adapter {folder} was trained on {base}, and not on {main}")
        sources[name] = source
    return sources


def load_voices(sources: dict[str, TunedSource], *, console: Console) -> Voices:
    """Load the base once, and all adapters."""
    from halfbyte.models import load_adapter

    (name, source), *others = sources.items()
    tuned = load_tuned(source, console=console, name=name)
    models = {name: tuned}
    for other, more in others:
        assert more.adapter is not None
        report = load_adapter(tuned.model, more.adapter, name=other)
        console.print(f"{other}: {report}", markup=False)
        if more.config.quant != source.config.quant:
            console.print(f"{other} was trained on a base that was held otherwise than {name}'s", style="yellow")
        tokenizer = tuned.tokenizer if more.tokenizer is None else find_tokenizer(str(more.tokenizer))
        models[other] = dataclasses.replace(tuned, tokenizer=tokenizer)
    return Voices(sources=sources, models=models, current=name)


def _named(text: str) -> tuple[str, str]:
    name, equals, folder = text.partition("=")
    return (name, folder) if equals else (_name_of(text), text)


def _name_of(folder: str) -> str:
    return Path(folder).resolve().name
