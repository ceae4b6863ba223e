"""What chat and generate share: how answers are made, and whose they are."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from halfbyte.cli.arguments import CommandParser
from halfbyte.cli.tuned import TunedModel, TunedSource
from halfbyte.errors import ConfigError

if TYPE_CHECKING:
    from halfbyte.data import Renderer
    from halfbyte.models.generate import GenerationOptions


def add_answer_arguments(parser: CommandParser) -> None:
    """Declare the arguments that decide an answer."""
    parser.add_argument("tuned", metavar="OUT", help="folder of a run or of a PEFT adapter; or a model")
    parser.add_argument("--compare", action="store_true", help="show the base model's answer too")
    parser.add_argument("--system", metavar="TEXT", help="system prompt; default: the one the run was trained with")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, default=256, help="longest answer; default: 256")
    parser.add_argument(
        "--temperature", metavar="X", type=float, default=0.0, help="0 takes the likeliest token; default: 0"
    )
    parser.add_argument("--top-p", metavar="X", type=float, default=1.0, help="draw from this share; default: 1")
    parser.add_argument("--top-k", metavar="N", type=int, default=0, help="draw from this many tokens; default: all")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the draws; default: 0")


def generation_options(args: argparse.Namespace) -> GenerationOptions:
    """Return the options that the arguments mean."""
    from halfbyte.models.generate import GenerationOptions

    return GenerationOptions(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
    )


def build_chat_renderer(args: argparse.Namespace, source: TunedSource, tuned: TunedModel) -> Renderer:
    """Return what turns a conversation into tokens, the way it was done in training."""
    from halfbyte.data import build_renderer

    system = source.config.data.system if args.system is None else args.system
    return build_renderer(tuned.tokenizer, chat_template=source.config.data.chat_template, system=system or None)


def check_comparable(args: argparse.Namespace, source: TunedSource) -> None:
    """Refuse --compare where there is no adapter, so that both answers would be the same."""
    if args.compare and source.adapter is None:
        raise ConfigError(f"--compare: {args.tuned} has no adapter, so there is no base to compare it with")


def answer(
    tuned: TunedModel,
    prompts: Sequence[list[int]],
    *,
    options: GenerationOptions,
    on_text: Callable[[int, str], None] | None = None,
    by_base: bool = False,
) -> list[str]:
    """Return the answers of the tuned model, or of its base, to prompts in tokens.

    Raises:
        ConfigError: A prompt leaves no room in the model's context.
    """
    from halfbyte.models.generate import generate_text
    from halfbyte.nn import adapters_disabled

    limit = getattr(tuned.model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts))
    if limit is not None and longest >= limit:
        raise ConfigError(f"a prompt of {longest} tokens leaves no room in this model's context of {limit}")
    with adapters_disabled(tuned.model) if by_base else contextlib.nullcontext():
        return generate_text(tuned.model, tuned.tokenizer, prompts, options=options, on_text=on_text)
