"""Our own decoding over a static cache against the library's forward and generate(); the step without a graph."""

from __future__ import annotations

import contextlib
import functools
import weakref

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from halfbyte.models import generate
from halfbyte.models.cache_name import cache_name
from halfbyte.models.fused_layers import fuse_layers_
from halfbyte.models.generate import GenerationOptions, choose_tokens, inference_state, iter_tokens
from halfbyte.models.half_storage import HalfEmbedding
from halfbyte.models.kept_decoders import borrow_decoder, keep_decoders
from halfbyte.models.static_decoder import StaticDecoder, cache_nbytes, why_not_static
from halfbyte.nn import adapters_disabled
from tests.models.test_fused_layers import FAMILIES, make_model

PROMPTS = [[5, 9, 33, 21, 8, 60, 14], [7, 7, 40], [11, 80, 3, 3, 52, 9]]
GREEDY = GenerationOptions(max_new_tokens=20)
NO_STOPS: frozenset[int] = frozenset()
# A window shorter than the prompts, in families that have one.
CHANGES: dict[str, dict[str, object]] = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
}


def make_fused(family: str, **changes: object) -> PreTrainedModel:
    model = make_model(family, **(CHANGES.get(family, {}) | changes)).eval()
    fuse_layers_(model)
    return model


def padded(prompts: list[list[int]], device: str = "cpu") -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


@torch.no_grad()
def start(model: PreTrainedModel, prompts: list[list[int]], **options: object) -> StaticDecoder:
    """Return a decoder that has taken over the prompts."""
    cache = DynamicCache(config=model.config)
    model(**padded(prompts, model.device.type), **{cache_name(model): cache}, use_cache=True)
    decoder = StaticDecoder(model, num_prompts=len(prompts), num_tokens=64, **{"greedy": False} | options)
    decoder.fill(cache, [len(p) for p in prompts])
    return decoder


@torch.no_grad()
def logits_without_cache(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    there = torch.tensor([ids], device=model.device)
    return model(there, use_cache=False).logits[0, -1].float()


def check_logits(
    model: PreTrainedModel, prompts: list[list[int]], *, steps: int = 8, tolerance: float = 1e-4, **options: object
) -> None:
    """Compare the logits of a few steps with the library's of the whole text."""
    decoder = start(model, prompts, **options)
    texts = [list(p) for p in prompts]
    for number in range(steps):
        for row, text in enumerate(texts):
            text.append((17 * number + 5 * row) % 90 + 3)
        decoder.token_B.copy_(torch.tensor([text[-1] for text in texts]))
        decoder.advance(lambda logits_BV: logits_BV.argmax(-1))
        expected = torch.stack([logits_without_cache(model, text) for text in texts])
        torch.testing.assert_close(decoder.logits_BV.float(), expected, rtol=tolerance, atol=tolerance)
    assert decoder.length_B.tolist() == [len(text) for text in texts]


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("family", FAMILIES)
def test_static_decoder_gives_the_librarys_logits(family: str, prompts: list[list[int]]) -> None:
    model = make_fused(family)
    assert why_not_static(model, len(prompts)) is None
    check_logits(model, prompts)
    with adapters_disabled(model):
        check_logits(model, prompts)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["k_proj", "up_proj", "down_proj"]], ids="-".join)
def test_static_decoder_takes_adapters_on_some_projections(targets: list[str]) -> None:
    check_logits(make_fused("qwen2", targets=targets), PROMPTS)


def test_static_decoder_takes_a_head_with_an_adapter() -> None:
    model = make_fused("llama", targets=["q_proj", "lm_head"])
    check_logits(model, PROMPTS)


def count_decoders(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows with each decoder."""
    made: list[int] = []

    class Counted(StaticDecoder):
        def __init__(self, *args: object, **kwargs: object) -> None:
            made.append(1)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(generate, "StaticDecoder", Counted)
    return made


@pytest.fixture
def statically(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have every answer decoded statically; the list counts decoders."""
    monkeypatch.setattr(generate, "decodes_statically", lambda *args, **kwargs: True)
    monkeypatch.setattr(generate, "decodes_expanded", lambda model: False)
    return count_decoders(monkeypatch)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("family", FAMILIES)
def test_iter_tokens_over_a_static_cache_equals_generate(
    family: str, prompts: list[list[int]], statically: list[int]
) -> None:
    model = make_model(family, **CHANGES.get(family, {})).eval()
    inputs = padded(prompts)
    expected = model.generate(
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=20,
        min_new_tokens=20,
        do_sample=False,
        eos_token_id=None,
    )
    with inference_state(model):
        tokens = list(iter_tokens(model, prompts, options=GREEDY, stop_ids=NO_STOPS))
    assert torch.tensor(tokens).T.tolist() == expected[:, inputs["input_ids"].shape[1] :].tolist()
    assert statically


@pytest.mark.parametrize("options", [GREEDY, GenerationOptions(max_new_tokens=20, temperature=0.9, top_k=30, seed=3)])
def test_iter_tokens_over_a_static_cache_stops_like_the_librarys(
    options: GenerationOptions, statically: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama").eval()
    run = functools.partial(iter_tokens, model, PROMPTS, options=options)
    with inference_state(model):
        free = list(run(stop_ids=NO_STOPS))
        stops = frozenset({free[4][0], free[2][1], free[6][2]})
        stopped = list(run(stop_ids=stops))
        monkeypatch.setattr(generate, "decodes_statically", lambda *args, **kwargs: False)
        assert list(run(stop_ids=NO_STOPS)) == free
        assert list(run(stop_ids=stops)) == stopped
    assert stopped[-1] == [None, None, None]
    assert len(stopped) < len(free)


def test_a_decoder_is_kept_for_what_it_serves(statically: list[int]) -> None:
    model = make_model("llama").eval()
    run = functools.partial(iter_tokens, model, options=GREEDY, stop_ids=NO_STOPS)
    with inference_state(model):
        first = list(run(PROMPTS))
        assert list(run(PROMPTS)) == first
        assert len(statically) == 1
        # In the middle of an answer it serves nobody else.
        running = run(PROMPTS)
        assert next(running) == first[0]
        assert list(run(PROMPTS)) == first
        assert [first[0], *running] == first
        assert len(statically) == 2
        with adapters_disabled(model):
            base = list(run(PROMPTS))
        assert base != first
        assert list(run(PROMPTS)) == first
        assert len(statically) == 4
        model.model.layers[0].self_attn.q_proj.lora_B.data.add_(1.0)
        model.model.layers[0].mlp.up_proj.lora_B.add_(1.0)
        assert list(run(PROMPTS)) != first
        assert len(statically) == 5
        assert list(run(PROMPTS[:1])) != []
        assert len(statically) == 6


def test_a_decoder_is_dropped_at_the_end() -> None:
    model = make_fused("llama")
    borrow = functools.partial(borrow_decoder, model, StaticDecoder, num_prompts=1, num_tokens=8, greedy=True)
    with keep_decoders(model):
        with borrow() as decoder:
            kept = weakref.ref(decoder.layers[0].key_BKCH)
        del decoder
        assert kept() is not None
    assert kept() is None
    with borrow() as decoder:
        kept = weakref.ref(decoder.layers[0].key_BKCH)
    assert kept() is None
    with contextlib.suppress(RuntimeError), borrow() as decoder:
        kept = weakref.ref(decoder.layers[0].key_BKCH)
        raise RuntimeError
    assert kept() is None


def test_why_not_static_says_what_does_not_fit() -> None:
    model = make_model("llama").eval()
    assert "not fused" in str(why_not_static(model, 1))
    fuse_layers_(model)
    assert why_not_static(model, 8) is None
    assert "more than" in str(why_not_static(model, 9))
    assert "train mode" in str(why_not_static(model.train(), 1))
    assert "not among" in str(why_not_static(make_model("gpt_neox").eval(), 1))
    stretched = make_model("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}).eval()
    fuse_layers_(stretched)
    assert "angles" in str(why_not_static(stretched, 1))


def test_cache_nbytes_is_what_a_decoder_allocates() -> None:
    model = make_fused("qwen3")
    decoder = StaticDecoder(model, num_prompts=3, num_tokens=300, greedy=True)
    assert decoder.cache_nbytes == cache_nbytes(model, 3, 300)
    assert decoder.layers[0].key_BKCH.shape == (3, 2, 512, 128)


def make_gpu_model(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.backends.cuda.matmul.allow_tf32 = False
    return make_fused(family, device="cuda", dtype=dtype, intermediate_size=128, hidden_size=128, head_dim=64)


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True], ids=["eager", "graph"])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("family", FAMILIES)
def test_static_decoder_on_a_gpu_gives_the_librarys_logits(family: str, prompts: list[list[int]], graph: bool) -> None:
    model = make_gpu_model(family)
    assert why_not_static(model, len(prompts)) is None
    for overlap in (False, True):
        # The kernel's lookup is within 2^-16 of a code's value.
        check_logits(model, prompts, graph=graph, overlap=overlap, tolerance=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_graph_gives_the_tokens_of_the_same_step_without_one(dtype: torch.dtype, temperature: float) -> None:
    model = make_gpu_model("qwen3", dtype)
    options = GenerationOptions(max_new_tokens=40, temperature=temperature)
    answers = []
    for graph, overlap in ((False, False), (True, False), (True, False), (False, True), (True, True), (True, True)):
        decoder = start(model, PROMPTS, greedy=temperature == 0, graph=graph, overlap=overlap)
        generator = torch.Generator("cuda").manual_seed(1)
        choose = functools.partial(choose_tokens, options=options, generator=generator)
        answers.append(list(decoder.steps(torch.tensor([5, 6, 7], device="cuda"), 40, choose)))
        decoder.close()
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "three"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generation_on_a_gpu_is_static_and_gives_the_librarys_tokens(
    temperature: float, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_decoders(monkeypatch)
    model = make_gpu_model("mistral")
    options = GenerationOptions(max_new_tokens=40, temperature=temperature, top_p=0.9)
    run = functools.partial(iter_tokens, model, prompts, options=options, stop_ids=NO_STOPS)
    with inference_state(model):
        static = list(run())
        assert list(run()) == static
        assert len(made) == 1
        monkeypatch.setattr(generate, "decodes_statically", lambda *args, **kwargs: False)
        assert list(run()) == static


@pytest.mark.gpu
def test_generation_on_a_gpu_gives_its_memory_back() -> None:
    model = make_gpu_model("llama")
    long = GenerationOptions(max_new_tokens=3000)

    def run() -> None:
        with inference_state(model):
            for number, _ in enumerate(iter_tokens(model, PROMPTS, options=long, stop_ids=NO_STOPS)):
                if number == 40:
                    assert torch.cuda.memory_allocated() > before + cache_nbytes(model, 3, 3000)
                    break

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run()
    # What is cached once, by kernels and cuBLAS.
    first = torch.cuda.memory_allocated()
    for _ in range(3):
        run()
    assert torch.cuda.memory_allocated() == first


def test_an_embedding_kept_in_other_bits_than_it_gives_is_decoded_in_what_it_gives() -> None:
    model = make_fused("llama")
    embedding = model.get_input_embeddings()
    model.set_input_embeddings(HalfEmbedding.from_embedding(embedding.to(torch.bfloat16), torch.float32))
    assert why_not_static(model, 1) is None
    assert StaticDecoder(model, num_prompts=1, num_tokens=64, greedy=True).dtype == torch.float32
    check_logits(model, PROMPTS[:1])
