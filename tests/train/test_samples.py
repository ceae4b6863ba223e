from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from halfbyte.data import Example, build_renderer
from halfbyte.models.generate import GenerationOptions, inference_state, iter_tokens
from halfbyte.train.samples import answer_questions, choose_questions, printable
from tests.train.runs import assert_same_values, build_model, build_trainer, logged, trained_values
from tests.train.tiny import build_tokenizer


def chat(number: int) -> Example:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", f"And {number}?")]
    messages = [{"role": role, "content": words} for role, words in [*turns, ("assistant", f"It is {number}.")]]
    return Example(origin=f"a.jsonl:{number}", messages=tuple(messages))


def test_choose_questions_spreads_over_the_examples() -> None:
    renderer = build_renderer(build_tokenizer())
    chosen = choose_questions([chat(n) for n in range(10)], renderer, count=3, max_tokens=500)
    assert [question.origin for question in chosen] == ["a.jsonl:0", "a.jsonl:3", "a.jsonl:6"]
    assert (chosen[1].text, chosen[1].expected) == ("And 3?", "It is 3.")
    prompt = build_tokenizer().decode(chosen[1].prompt_ids)
    assert prompt.endswith("And 3?<|im_end|>\n<|im_start|>assistant\n")
    assert "It is 3" not in prompt


def test_choose_questions_takes_prompts_and_leaves_texts_and_long_ones() -> None:
    renderer = build_renderer(build_tokenizer())
    examples = [
        Example(origin="a:1", text="just a text"),
        Example(origin="a:2", prompt="Q: 1 + 1?\nA:", completion=" 2"),
        Example(origin="a:3", prompt="x" * 200, completion="y"),
    ]
    chosen = choose_questions(examples, renderer, count=5, max_tokens=100)
    assert [(q.origin, q.text, q.expected) for q in chosen] == [("a:2", "Q: 1 + 1?\nA:", "2")]
    assert choose_questions(examples, renderer, count=0, max_tokens=100) == []


def test_answer_questions_asks_the_base_or_the_tuned_model() -> None:
    tokenizer = build_tokenizer()
    model = build_model()
    with_effect = dict(model.named_parameters())
    for name, parameter in with_effect.items():
        if name.endswith("lora_B"):
            parameter.data.mul_(200)
    questions = choose_questions([chat(1), chat(2)], build_renderer(tokenizer), count=2, max_tokens=500)
    base, tuned = (answer_questions(model, tokenizer, questions, max_new_tokens=6, by_base=b) for b in (True, False))
    assert len(base) == len(tuned) == 2
    assert base != tuned
    assert answer_questions(model, tokenizer, [], max_new_tokens=6, by_base=True) == []


def test_printable_disarms_control_characters() -> None:
    assert printable("a\tb\n\x1b[31mred\x07") == "a\tb\n\\x1b[31mred\\x07"


def test_training_with_answers_in_between_equals_training_without(tmp_path: Path) -> None:
    class Ask(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            options = GenerationOptions(max_new_tokens=6, temperature=0.7)
            with inference_state(model):
                assert list(iter_tokens(model, [[5, 9, 33], [7, 8]], options=options, stop_ids=frozenset()))

    runs = []
    for callbacks in ([], [Ask()]):
        trainer = build_trainer(tmp_path / str(len(runs)), max_steps=4, callbacks=callbacks)
        trainer.train()
        runs.append((logged(trainer), trained_values(trainer.model)))
    assert runs[0][0] == runs[1][0]
    assert_same_values(runs[0][1], runs[1][1])
