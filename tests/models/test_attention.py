from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from halfbyte.errors import ConfigError
from halfbyte.models.attention import DocumentLayout, packed_attention_forward, register_packed_attention
from halfbyte.models.packed_inputs import (
    build_forward_inputs,
    prove_causality,
    prove_isolation,
    read_hidden_states,
)
from tests.oracles import assert_close
from tests.train.tiny import CONFIGS, VOCABULARY, build_tiny

ROW_TOKENS = 24
ROWS = [[7, 9, 8], [24], [12, 12]]
BACKENDS = ["eager", "sdpa", "halfbyte"]
# transformers drops the softcap of Gemma 2 under sdpa, or refuses.
PAIRS = [(family, backend) for family in CONFIGS for backend in BACKENDS if (family, backend) != ("gemma2", "sdpa")]


def packed_batch(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    lengths = [length for row in rows for length in row]
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (len(rows), sum(rows[0])), generator=generator)
    labels = torch.full_like(ids, -100).flatten()
    start = 0
    for length in lengths:
        labels[start : start + length - 1] = ids.flatten()[start + 1 : start + length]
        start += length
    return {
        "input_ids": ids,
        "labels": labels.view_as(ids),
        "position_ids": torch.cat([torch.arange(length) for length in lengths]).view_as(ids),
        "cu_seq_lens": torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32),
    }


def documents(batch: dict[str, torch.Tensor]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    edges = batch["cu_seq_lens"].tolist()
    flat_ids, flat_labels = batch["input_ids"].flatten(), batch["labels"].flatten()
    return [(flat_ids[a:b][None], flat_labels[a:b][None]) for a, b in itertools.pairwise(edges)]


def token_losses(model: PreTrainedModel, inputs: dict[str, torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    logits = model(**inputs).logits
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")


def use_attention(model: PreTrainedModel, name: str) -> None:
    register_packed_attention()
    model.set_attn_implementation(name)


@pytest.mark.parametrize(("family", "backend"), PAIRS)
def test_packed_attention_matches_one_by_one(family: str, backend: str) -> None:
    batch = packed_batch(ROWS)
    model = build_tiny(family)
    alone = torch.cat([token_losses(model, {"input_ids": ids, "use_cache": False}, y) for ids, y in documents(batch)])
    alone.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    use_attention(model, backend)
    packed = token_losses(model, build_forward_inputs(model, batch), batch["labels"])
    packed.sum().backward()

    assert_close("loss of each token", alone, packed, dtype=torch.float32, roundings=64)
    for name, grad in expected.items():
        actual = model.get_parameter(name).grad
        assert actual is not None
        assert_close(name, grad, actual, dtype=torch.float32, roundings=512, reduction_length=72)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_packed_attention_matches_one_by_one_under_flex(family: str) -> None:
    batch = packed_batch([[100, 28], [128]])
    model = build_tiny(family).requires_grad_(False)
    with torch.no_grad():
        alone = torch.cat([token_losses(model, {"input_ids": ids}, labels) for ids, labels in documents(batch)])
        use_attention(model, "flex_attention")
        packed = token_losses(model, build_forward_inputs(model, batch), batch["labels"])
    assert_close("loss of each token", alone, packed, dtype=torch.float32, roundings=64)


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_attention_with_layout_matches_without(family: str) -> None:
    batch = packed_batch(ROWS)
    model = build_tiny(family)
    use_attention(model, "halfbyte")
    layout = DocumentLayout.from_boundaries(batch["cu_seq_lens"].tolist())
    expected = read_hidden_states(model, batch)
    actual = read_hidden_states(model, {**batch, "document_layout": layout})
    assert torch.equal(expected, actual)


def test_document_layout_groups_equal_neighbours() -> None:
    layout = DocumentLayout.from_boundaries([0, 7, 14, 16, 23])
    assert layout.runs == ((2, 7), (1, 2), (1, 7))
    assert layout.max_length == 7


def test_packed_attention_builds_no_mask_of_the_whole_batch() -> None:
    batch = packed_batch(ROWS)
    model = build_tiny("gemma3")
    use_attention(model, "halfbyte")
    inputs = build_forward_inputs(model, batch)
    assert inputs["attention_mask"].numel() == 1


@pytest.mark.parametrize("family", CONFIGS)
def test_packed_attention_leaves_padded_batches_and_caches_right(family: str) -> None:
    model = build_tiny(family).eval()
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected_logits = model(input_ids=ids, attention_mask=mask).logits
    expected_ids = model.generate(ids, **options)
    use_attention(model, "halfbyte")
    actual = model(input_ids=ids, attention_mask=mask).logits
    seen = mask.bool()
    assert_close("logits", expected_logits[seen], actual[seen], dtype=torch.float32, roundings=64)
    assert torch.equal(model.generate(ids, **options), expected_ids)


def test_right_padding_needs_no_mask() -> None:
    model = build_tiny("qwen3")
    use_attention(model, "halfbyte")
    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    expected = model(input_ids=ids, attention_mask=mask).logits[1, :7]
    actual = model(**build_forward_inputs(model, {"input_ids": ids, "attention_mask": mask})).logits[1, :7]
    assert_close("logits", expected, actual, dtype=torch.float32, roundings=64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_prove_isolation_accepts_what_isolates(family: str, backend: str) -> None:
    model = build_tiny(family)
    use_attention(model, backend)
    prove_isolation(model)
    prove_causality(model)
    assert model.training


def test_prove_isolation_refuses_what_leaks() -> None:
    def ignores_the_mask(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    AttentionInterface.register("leaky", ignores_the_mask)
    model = build_tiny("llama", attention="leaky")
    with pytest.raises(ConfigError, match="see each other"):
        prove_isolation(model)
    prove_causality(model)


def test_prove_causality_refuses_what_looks_ahead() -> None:
    def sees_everything(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        return sdpa_attention_forward(module, query, key, value, None, is_causal=False)

    AttentionInterface.register("ahead", sees_everything)
    with pytest.raises(ConfigError, match="those after them"):
        prove_causality(build_tiny("llama", attention="ahead"))


def test_packed_attention_refuses_to_go_without_boundaries_it_should_have() -> None:
    states, mark = torch.randn(1, 2, 8, 4), torch.ones(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(ConfigError, match="not told where documents end"):
        packed_attention_forward(torch.nn.Module(), states, states, states, mark)


def test_packed_attention_supports_sinks() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)
    sinks = torch.randn(4)
    boundaries = torch.tensor([0, 4, 9], dtype=torch.int32)
    module = torch.nn.Module()
    packed, _ = packed_attention_forward(module, query, key, value, None, cu_seq_lens_q=boundaries, s_aux=sinks)
    for start, end in ((0, 4), (4, 9)):
        for head in range(4):
            scores = query[0, head, start:end] @ key[0, head // 2, start:end].T / 8**0.5
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
            with_sink = torch.cat([scores, sinks[head].expand(end - start, 1)], dim=1).softmax(1)
            expected = with_sink[:, :-1] @ value[0, head // 2, start:end]
            assert_close("head", expected, packed[0, start:end, head], dtype=torch.float32, roundings=16)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"is_causal": False}, "not causal"), ({"position_bias": torch.zeros(1)}, "position bias")],
)
def test_packed_attention_refuses_what_it_cannot_do(change: dict[str, object], message: str) -> None:
    states = torch.randn(1, 2, 8, 4)
    boundaries = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ConfigError, match=message):
        packed_attention_forward(torch.nn.Module(), states, states, states, None, cu_seq_lens_q=boundaries, **change)


def test_packed_attention_refuses_a_cache() -> None:
    states, longer = torch.randn(1, 2, 8, 4), torch.randn(1, 2, 9, 4)
    boundaries = torch.tensor([0, 3, 8], dtype=torch.int32)
    with pytest.raises(ConfigError, match="use_cache=False"):
        packed_attention_forward(torch.nn.Module(), states, longer, longer, None, cu_seq_lens_q=boundaries)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[100, 28, 300, 84], [128, 128, 128, 128], [512]], ids=["ragged", "equal", "one"])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_packed_attention_on_gpu_matches_fp64(
    lengths: list[int], window: int | None, key_heads: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    tokens, heads, width = sum(lengths), 8, 64
    shapes = [(1, n, tokens, width) for n in (heads, key_heads, key_heads)]
    states = [torch.randn(s, device="cuda", generator=generator).to(dtype).requires_grad_() for s in shapes]
    grad = torch.randn(1, tokens, heads, width, device="cuda", generator=generator).to(dtype)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device="cuda")
    layout = DocumentLayout.from_boundaries(boundaries.tolist())
    out, _ = packed_attention_forward(
        torch.nn.Module(),
        *states,
        None,
        cu_seq_lens_q=boundaries,
        document_layout=layout,
        sliding_window=window,
    )
    out.backward(grad)

    exact = [state.detach().double().requires_grad_() for state in states]
    parts, start = [], 0
    for length in lengths:
        query, key, value = (t[0, :, start : start + length] for t in exact)
        key, value = (t.repeat_interleave(heads // key_heads, dim=0) for t in (key, value))
        distance = torch.arange(length, device="cuda")[:, None] - torch.arange(length, device="cuda")
        seen = (distance >= 0) & (distance < (window or length))
        scores = (query @ key.transpose(1, 2) / width**0.5).masked_fill(~seen, -torch.inf)
        parts.append((scores.softmax(-1) @ value).transpose(0, 1))
        start += length
    expected = torch.cat(parts)[None]
    expected.backward(grad.double())
    assert_close("out", expected, out, dtype=dtype, roundings=4, reduction_length=512)
    for name, a, b in zip("qkv", exact, states, strict=True):
        assert_close(name, a.grad, b.grad, dtype=dtype, roundings=8, reduction_length=512)
