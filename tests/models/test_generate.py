from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from halfbyte.errors import ConfigError
from halfbyte.models.attention import register_packed_attention
from halfbyte.models.generate import (
    GenerationOptions,
    choose_tokens,
    encode_prompt,
    find_stop_ids,
    generate_text,
    iter_tokens,
)
from tests.train.tiny import CONFIGS, build_tiny, build_tokenizer

PROMPTS = ["Where is my order?", "Refund", "I want to change my address please, it is wrong."]
GREEDY = GenerationOptions(max_new_tokens=12)


def build_model(family: str = "llama") -> PreTrainedModel:
    model = build_tiny(family)
    model.set_attn_implementation(register_packed_attention())
    return model


@pytest.mark.parametrize("family", CONFIGS)
def test_iter_tokens_matches_transformers_generate(family: str) -> None:
    model = build_model(family).eval()
    tokenizer = build_tokenizer()
    encoded = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS]
    for prompts in (encoded, [encoded[0]], [encoded[1], encoded[1]]):
        steps = list(iter_tokens(model, prompts, options=GREEDY, stop_ids=frozenset()))
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        expected = model.generate(
            ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert torch.tensor(steps).T.tolist() == expected[:, longest:].tolist()


def test_generate_text_stops_at_the_end_of_the_turn() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    ids = encode_prompt(tokenizer, PROMPTS[0])
    free = [step[0] for step in iter_tokens(model.eval(), [ids], options=GREEDY, stop_ids=frozenset())]
    stop = free[4]
    first = free.index(stop)
    stopped = [step[0] for step in iter_tokens(model, [ids], options=GREEDY, stop_ids=frozenset({stop}))]
    assert stopped == [*free[:first], None]


def test_find_stop_ids_knows_every_end() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    model.generation_config.eos_token_id = [7, 8]
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert find_stop_ids(model, tokenizer) == {7, 8, tokenizer.eos_token_id, end_of_turn}


def test_generate_text_answers_in_order_whatever_the_batch() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    one_by_one = [generate_text(model, tokenizer, [p], options=GREEDY)[0] for p in PROMPTS]
    assert generate_text(model, tokenizer, PROMPTS, options=GREEDY) == one_by_one


def test_generate_text_streams_what_it_returns() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    pieces: dict[int, list[str]] = {0: [], 1: [], 2: []}
    answers = generate_text(model, tokenizer, PROMPTS, options=GREEDY, on_text=lambda i, text: pieces[i].append(text))
    assert ["".join(pieces[i]) for i in range(3)] == answers
    assert max(len(parts) for parts in pieces.values()) > 1


def test_generate_text_takes_messages_text_and_ids() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    messages = [{"role": "user", "content": "Hi"}]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    answers = generate_text(model, tokenizer, [messages, text, ids], options=GREEDY)
    assert len(set(answers)) == 1


def test_generate_text_leaves_the_model_as_it_was() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    before = torch.get_rng_state()
    generate_text(model, tokenizer, PROMPTS, options=GenerationOptions(max_new_tokens=3, temperature=1.0))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()


def test_generate_text_draws_the_same_from_the_same_seed() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    options = [GenerationOptions(max_new_tokens=20, temperature=2.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (generate_text(model, tokenizer, PROMPTS, options=o) for o in options)
    assert first == again
    assert first != other


def test_choose_tokens_draws_with_the_right_frequencies() -> None:
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probability.log().expand(20_000, -1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options: float) -> torch.Tensor:
        chosen = choose_tokens(logits, options=GenerationOptions(**options), generator=generator)
        return chosen.bincount(minlength=4) / len(chosen)

    # Five standard deviations of a share of 20,000 draws.
    bound = 5 * (0.25 / 20_000) ** 0.5
    assert (frequencies(temperature=1.0) - probability).abs().max() < bound
    assert (frequencies(temperature=1.0, top_k=2) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < bound
    nucleus = torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95
    assert (frequencies(temperature=1.0, top_p=0.9) - nucleus).abs().max() < bound
    assert frequencies(temperature=1.0, top_p=0.4)[0] == 1
    cold = (probability.log() / 0.5).softmax(0)
    assert (frequencies(temperature=0.5) - cold).abs().max() < bound


def test_generate_text_refuses_what_it_cannot_answer() -> None:
    model, tokenizer = build_model(), build_tokenizer()
    with pytest.raises(ConfigError, match="empty"):
        generate_text(model, tokenizer, [""])
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template"):
        generate_text(model, tokenizer, [[{"role": "user", "content": "Hi"}]])
    with pytest.raises(ConfigError, match="top_p is 0"):
        GenerationOptions(top_p=0)
