"""Text from a model: batched, greedy or sampled, stopping at the end of the turn.

The loop is ours. For the models that it knows a `StaticDecoder` makes a token in one launch on a GPU, and an
`ExpandedDecoder` in a few calls on a CPU. Otherwise it is one forward a token over transformers' own cache, which is
what model.generate() does without its bookkeeping; prompts of a batch are then padded on the left. The model comes back
as it was: train or eval mode of every module, no cached state, no draw from the global random numbers.

On a CPU, 4-bit weights are kept expanded while generating, because one token reads each weight once and expanding it
costs more than the product; not so where that would take more than half of the memory that is left.

Shapes: B prompts of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from halfbyte.device import available_bytes
from halfbyte.errors import ConfigError
from halfbyte.memory.bounded import bounded
from halfbyte.models.cache_name import cache_name
from halfbyte.models.expanded_decoder import ExpandedDecoder
from halfbyte.models.fused_layers import fuse_layers_, iter_fused_layers, unfuse_layers_
from halfbyte.models.host_embedding import compute_device_of
from halfbyte.models.kept_decoders import borrow_decoder, decodes_expanded, decodes_statically, keep_decoders
from halfbyte.models.modes import eval_mode
from halfbyte.models.static_decoder import Choose, StaticDecoder
from halfbyte.nn import expanded_for_inference, expanded_nbytes

Message = dict[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]
OnText = Callable[[int, str], None]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GenerationOptions:
    """How tokens are chosen, and how many."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; above, tokens are drawn from the softmax of logits / temperature."""
    top_k: int = 0
    """Draw from this many likeliest tokens only. 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this share of the probability."""
    seed: int = 0
    """Of the draws."""
    batch_size: int = 8
    """Prompts answered together."""

    def __post_init__(self) -> None:
        for name, value, fits, allowed in (
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature, self.temperature >= 0, "0 or above"),
            ("top_k", self.top_k, self.top_k >= 0, "0 or above"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0, at most 1"),
            ("batch_size", self.batch_size, self.batch_size >= 1, "at least 1"),
        ):
            if not fits:
                raise ConfigError(f"{name} is {value}; allowed: {allowed}")


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    options: GenerationOptions | None = None,
    on_text: OnText | None = None,
) -> list[str]:
    """Answer each prompt.

    Args:
        model: A causal language model, with or without adapters; it is left as it was.
        tokenizer: Its tokenizer.
        prompts: Each a list of messages (rendered with the chat template), a text to go on from, or token ids.
        options: How tokens are chosen; greedy by default.
        on_text: Called with the prompt's number and each new piece of its answer as it arrives.

    Returns:
        The answers in the order of the prompts, without the end-of-turn token.

    Raises:
        ConfigError: A prompt is empty, or messages are given and the tokenizer has no chat template.
    """
    options = options or GenerationOptions()
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    stop_ids = find_stop_ids(model, tokenizer)
    # Prompts of like length share a batch, so that little is padded.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    answers = [""] * len(encoded)
    with inference_state(model):
        for start in range(0, len(order), options.batch_size):
            numbers = order[start : start + options.batch_size]
            streams = [_TextStream(tokenizer, number, on_text) for number in numbers]
            for tokens in iter_tokens(model, [encoded[n] for n in numbers], options=options, stop_ids=stop_ids):
                for stream, token in zip(streams, tokens, strict=True):
                    if token is not None:
                        stream.add(token)
            for number, stream in zip(numbers, streams, strict=True):
                answers[number] = stream.finish()
    return answers


def iter_tokens(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, options: GenerationOptions, stop_ids: frozenset[int]
) -> Iterator[list[int | None]]:
    """Yield the next token of each prompt, step by step; None where the answer has ended."""
    device = compute_device_of(model)
    generator = torch.Generator(device).manual_seed(options.seed)
    choose = functools.partial(choose_tokens, options=options, generator=generator)
    running = [True] * len(prompts)
    with contextlib.closing(_iter_steps(model, prompts, choose, options=options)) as steps:
        for tokens in steps:
            running = [alive and token not in stop_ids for alive, token in zip(running, tokens, strict=True)]
            yield [token if alive else None for token, alive in zip(tokens, running, strict=True)]
            if not any(running):
                return


def _iter_steps(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], choose: Choose, *, options: GenerationOptions
) -> Generator[list[int]]:
    """Yield what `choose` makes of each step's logits, whether or not an answer has ended."""
    lengths = [len(ids) for ids in prompts]
    # The last token is never an input.
    size = {"num_prompts": len(prompts), "num_tokens": max(lengths) + options.max_new_tokens - 1}
    if decodes_expanded(model):
        with borrow_decoder(model, ExpandedDecoder, **size) as decoder:
            yield from decoder.steps(choose(decoder.read(prompts)), options.max_new_tokens, choose)
        return
    inputs, mask_BT = _left_padded(model, prompts, device=compute_device_of(model))
    cache = DynamicCache(config=model.config)
    first_B = choose(_next_logits(model, inputs, cache))
    if not decodes_statically(model, num_new_tokens=options.max_new_tokens, **size):
        yield from _iter_library_steps(model, cache, mask_BT, first_B, choose, options=options)
        return
    with borrow_decoder(model, StaticDecoder, greedy=options.temperature == 0, **size) as recorded:
        recorded.fill(cache, lengths)
        del cache
        yield from recorded.steps(first_B, options.max_new_tokens, choose)


def _iter_library_steps(
    model: PreTrainedModel,
    cache: DynamicCache,
    mask_BT: torch.Tensor | None,
    chosen_B: torch.Tensor,
    choose: Choose,
    *,
    options: GenerationOptions,
) -> Iterator[list[int]]:
    """Go through the library's layers with each token."""
    yield chosen_B.tolist()
    for _ in range(options.max_new_tokens - 1):
        inputs = {"input_ids": chosen_B[:, None]}
        if mask_BT is not None:
            mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), 1)], dim=1)
            inputs |= {"attention_mask": mask_BT, "position_ids": mask_BT.sum(1, keepdim=True) - 1}
        chosen_B = choose(_next_logits(model, inputs, cache))
        yield chosen_B.tolist()


def _next_logits(model: PreTrainedModel, inputs: dict[str, torch.Tensor], cache: DynamicCache) -> torch.Tensor:
    held = {cache_name(model): cache}
    logits: torch.Tensor = model(**inputs, **held, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].float()


def choose_tokens(logits_BV: torch.Tensor, *, options: GenerationOptions, generator: torch.Generator) -> torch.Tensor:
    """Return one token id a row, the likeliest or a drawn one."""
    if options.temperature == 0:
        return logits_BV.argmax(-1)
    logits_BV = logits_BV / options.temperature
    if options.top_k:
        kth = logits_BV.topk(min(options.top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth, -torch.inf)
    if options.top_p < 1:
        sorted_BV, order_BV = logits_BV.sort(descending=True)
        probability_BV = sorted_BV.softmax(-1)
        # A token stays while those before it hold less than top_p, so that the likeliest always stays.
        beyond_BV = probability_BV.cumsum(-1) - probability_BV >= options.top_p
        logits_BV = logits_BV.masked_fill(beyond_BV.scatter(-1, order_BV, beyond_BV), -torch.inf)
    # What torch.multinomial does, without asking the device whether the shares are valid, which waits for it.
    share_BV = logits_BV.softmax(-1)
    return (share_BV / torch.empty_like(share_BV).exponential_(generator=generator)).argmax(-1)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the token ids that the model goes on from."""
    ids: Any
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif prompt and isinstance(prompt[0], int):
        ids = list(prompt)
    else:
        if not tokenizer.chat_template:
            raise ConfigError("this tokenizer has no chat template, so messages cannot be rendered; give a text prompt")
        messages: Any = list(prompt)
        with bounded("the chat template"):
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    if not ids:
        raise ConfigError("the prompt is empty")
    return list(ids)


def find_stop_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends an answer: the model's, the tokenizer's, and the chat template's end of turn."""
    stops: set[int] = set()
    generation = getattr(model, "generation_config", None)
    for source in (model.config.get_text_config(decoder=True), generation, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        stops |= set() if ids is None else set(ids) if isinstance(ids, (list, tuple)) else {ids}
    if tokenizer.chat_template:
        stops |= _end_of_turn(tokenizer)
    return frozenset(stops)


@contextlib.contextmanager
def inference_state(model: PreTrainedModel) -> Iterator[None]:
    """Put the model into eval mode without gradients, and back into exactly the state it was in."""
    # no_grad, not inference_mode: scratch buffers that grow in here are written again in training.
    with eval_mode(model), torch.no_grad(), _fused(model), keep_decoders(model), _expanded(model):
        yield


@contextlib.contextmanager
def _expanded(model: PreTrainedModel) -> Iterator[None]:
    """Keep weights expanded for the library's layers on a CPU, where no decoder of ours does so."""
    needed = compute_device_of(model).type == "cpu" and not decodes_expanded(model)
    if not needed or expanded_nbytes(model) > available_bytes() // 2:
        yield
        return
    with expanded_for_inference(model):
        yield


@contextlib.contextmanager
def _fused(model: PreTrainedModel) -> Iterator[None]:
    """Let fused layers decode, where all of a model's layers fit."""
    if any(True for _ in iter_fused_layers(model)) or not fuse_layers_(model).num_fused:
        yield
        return
    try:
        yield
    finally:
        unfuse_layers_(model)


class _TextStream:
    """Turns tokens into text piece by piece; a character split over tokens waits until it is whole."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, number: int, on_text: OnText | None) -> None:
        self.tokenizer, self.number, self.on_text = tokenizer, number, on_text
        self.ids: list[int] = []
        self.shown = ""

    def add(self, token: int) -> None:
        self.ids.append(token)
        if self.on_text is not None:
            text = self._text()
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._show(text)

    def finish(self) -> str:
        text = self._text()
        if self.on_text is not None:
            self._show(text)
        return text

    def _text(self) -> str:
        return str(self.tokenizer.decode(self.ids, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > len(self.shown):
            assert self.on_text is not None
            self.on_text(self.number, text[len(self.shown) :])
            self.shown = text


def _left_padded(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
    """Return the first forward's keywords and its mask; no mask, and the fast path, where nothing is padded."""
    longest = max(len(ids) for ids in prompts)
    if all(len(ids) == longest for ids in prompts):
        return {"input_ids": torch.tensor([list(ids) for ids in prompts], device=device)}, None
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise ConfigError(f"{type(model).__name__} takes no positions, so prompts cannot be padded; use batch_size=1")
    pads = [longest - len(ids) for ids in prompts]
    ids_BT = torch.tensor([[0] * pad + list(ids) for pad, ids in zip(pads, prompts, strict=True)], device=device)
    mask_BT = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
    position_ids = (mask_BT.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": position_ids}, mask_BT


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the special token that the chat template puts behind an assistant's words, if it puts one."""
    words = "halfbyte"
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": words}]
    with bounded("the chat template"):
        rendered = str(tokenizer.apply_chat_template(turns, tokenize=False))
    behind = tokenizer(rendered.rpartition(words)[2], add_special_tokens=False)["input_ids"]
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = added | set(tokenizer.all_special_ids)
    return {next(iter(ids)) for ids in [[token for token in behind if token in special]] if ids}
