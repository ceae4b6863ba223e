"""Chat templates that loop, grow, pry or fail: an error within bounds, and nothing read that is not theirs."""

from __future__ import annotations

import resource
import signal
import time

import pytest
from transformers import PreTrainedTokenizerBase

from halfbyte.data.chat import ChatTemplate, TemplateRefusalError
from halfbyte.data.examples import Example
from halfbyte.data.render import build_renderer
from halfbyte.errors import DataError
from halfbyte.memory.bounded import MAX_EXTRA_BYTES, bounded, bounds_kept
from tests.models.tiny import build_tokenizer

TURNS = ({"role": "user", "content": "Hi"},)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
CALLS = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
GROWING = {
    "times": "{{ 'x' * 9999999999 }}",
    "padded": "{{ 'x' | center(9999999999) }}",
    "formatted": "{{ '%9999999999d' % 1 }}",
    "doubled": "{% set n = namespace(t='xxx') %}{% for a in range(40) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "lists": "{{ ([0] * 9999999999) | length }}",
    "joined": "{{ (['x' * 999999] * 999999) | join }}",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


def _render(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    return ChatTemplate(tokenizer, text=text, origin="a test's").render(TURNS)


@pytest.mark.parametrize("text", [ENDLESS, CALLS], ids=["loops", "calls"])
def test_a_template_without_end_is_stopped(
    text: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is tested is that the timer stops it; a second of that is enough.
    with pytest.raises(DataError, match="stopped after 1 s"), bounded("it", seconds=1.0):
        tokenizer.apply_chat_template(list(TURNS), chat_template=text, tokenize=False)
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)


def test_the_bound_of_time_is_that_of_templates(tokenizer: PreTrainedTokenizerBase) -> None:
    start = time.process_time()
    with pytest.raises(DataError, match="a test's"):
        _render(tokenizer, ENDLESS)
    assert time.process_time() - start < 15


@pytest.mark.parametrize("text", GROWING.values(), ids=GROWING.keys())
def test_a_template_that_grows_is_stopped(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    limits, before = resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError):
        _render(tokenizer, text)
    # What the process had mapped and never touched may be touched as well; ru_maxrss counts KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 * MAX_EXTRA_BYTES / 1024
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


def test_kept_bounds_are_those_of_each_program(tokenizer: PreTrainedTokenizerBase) -> None:
    handler, limits = signal.getsignal(signal.SIGVTALRM), resource.getrlimit(resource.RLIMIT_AS)
    held = []
    with bounds_kept():
        kept = signal.getsignal(signal.SIGVTALRM)
        for _ in range(3):
            # Together they take more than one of them may, of time and of memory.
            with bounded("it", seconds=0.5, extra_bytes=64 << 20):
                end = time.process_time() + 0.3
                held.append(bytes(40 << 20))
                while time.process_time() < end:
                    pass
            assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
            assert resource.getrlimit(resource.RLIMIT_AS) == limits
        with pytest.raises(DataError, match=r"stopped after 0\.5 s"), bounded("it", seconds=0.5):
            tokenizer.apply_chat_template(list(TURNS), chat_template=ENDLESS, tokenize=False)
        with pytest.raises(DataError, match="more than 64 MiB"), bounded("it", extra_bytes=64 << 20):
            # More than earlier tests can have left mapped and free, which may be used again.
            held.append(bytes(16 << 30))
        assert signal.getsignal(signal.SIGVTALRM) is kept
    assert signal.getsignal(signal.SIGVTALRM) is handler


@pytest.mark.parametrize("text", [CALLS, GROWING["doubled"]], ids=["calls", "doubled"])
def test_a_template_is_stopped_among_many_examples(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    answered = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"})
    growing = (*answered, {"role": "user", "content": "more"}, {"role": "assistant", "content": "Ho"})
    plain = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    asked = "{% if add_generation_prompt %}assistant: {% endif %}"
    renderer = build_renderer(
        tokenizer, chat_template=plain + "{% if messages | length > 2 %}" + text + "{% endif %}" + asked
    )
    examples = [Example(f"x:{n}", messages=growing if n == 3 else answered) for n in range(5)]
    with pytest.raises(DataError, match=r"x:3: the chat template .* was stopped"):
        renderer.render_batch(examples)
    assert len(renderer.render_batch(examples[:3])) == 3


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ('' | attr('__class__')).__mro__ }}",
        "{{ '{0.__class__.__mro__}'.format('') }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ messages.append(1) }}",
        "{{ open('/etc/passwd') }}",
        "{{ 1 / 0 }}",
        "{{ {}['x']['y'] }}",
        "{{ 9.0 ** 999 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_pries_or_fails_is_refused(text: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError):
        _render(tokenizer, text)


def test_an_attribute_that_is_not_to_be_seen_is_nothing(tokenizer: PreTrainedTokenizerBase) -> None:
    assert _render(tokenizer, "{{ ''.__class__ }}{{ messages.__init__ }}{{ raise_exception.__globals__ }}") == ""


def test_a_template_that_refuses_is_not_one_that_was_stopped(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TemplateRefusalError, match="no systems"):
        _render(tokenizer, "{{ raise_exception('no systems') }}")
