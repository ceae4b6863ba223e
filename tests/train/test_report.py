"""The report of a real run: well-formed, self-contained, escaped, and with the numbers of summary.json."""

from __future__ import annotations

import html.parser
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
from rich.console import Console

from halfbyte.train import run_training
from halfbyte.train.report.axis import make_axis, make_step_axis, short_number
from halfbyte.train.report.curves import Point, curve_of, smooth
from halfbyte.train.report.figures import merge_small
from halfbyte.train.report.markup import element, escape
from halfbyte.train.report.record import Part
from tests.train.test_run import config_of

ATTACK = "<script>alert('\"&')</script><img src=http://evil.example/x.png onerror=alert(1)>"
VOID = {"meta", "br", "hr"}
BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)


class Reading(html.parser.HTMLParser):
    """Reads a page strictly: every element is closed by its own end tag."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


class Reported(NamedTuple):
    """A run's folder, and what its page says."""

    folder: Path
    page: str
    reading: Reading

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.reading.text).split())


@pytest.fixture(scope="module")
def reported(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Reported:
    folder = tmp_path_factory.mktemp("run") / "out & <b>about"
    data = folder.parent / "tickets.jsonl"
    rows = [{"question": f"{n} {ATTACK}", "answer": f"It is {n * n}. {ATTACK}"} for n in range(12)]
    data.write_text("\n".join(json.dumps(row) for row in rows))
    options = {"data.max_length": 256, "train.logging_steps": 1, "train.eval_steps": 2}
    run_training(config_of(model_folder, data, folder, **options), console=Console(file=io.StringIO()))
    return read_report(folder)


def read_report(folder: Path) -> Reported:
    page = (folder / "report.html").read_text(encoding="utf-8")
    reading = Reading()
    reading.feed(page)
    reading.close()
    assert reading.open == []
    return Reported(folder, page, reading)


def test_report_is_self_contained(reported: Reported) -> None:
    assert not {"link", "img", "iframe", "object", "image", "use"} & set(reported.reading.tags)
    for tag, name, value in reported.reading.attributes:
        assert name not in ("src", "href", "xlink:href", "srcset", "action"), f"<{tag} {name}={value!r}>"
        assert not name.startswith("on"), f"<{tag} {name}>"
    assert "url(" not in reported.page
    assert "@import" not in reported.page
    assert re.search(r"Content-Security-Policy\" content=\"default-src &#x27;none&#x27;", reported.page)


def test_report_escapes_what_the_data_say(reported: Reported) -> None:
    assert "alert(" in reported.words
    assert reported.reading.tags.count("script") == 1
    assert "<script>alert" not in reported.page
    assert "<b>about" not in reported.page
    assert reported.words.count(ATTACK) >= 4
    assert escape("\r\n\t\x00\x1b[31m\ud800") == "\n\t\\x00\\x1b[31m\\ud800"


def test_report_has_the_numbers_of_the_summary(reported: Reported) -> None:
    summary = json.loads((reported.folder / "summary.json").read_text())
    before, after = summary["held_out_before"], summary["held_out_after"]
    for number in (
        f"{before['loss']:.4f} \u2192 {after['loss']:.4f}",
        f"perplexity {before['perplexity']:.2f} \u2192 {after['perplexity']:.2f}",
        f"{summary['num_tokens']:,} tokens, {summary['num_trained_tokens']:,} of them learned",
        f"{summary['tokens_per_second']:,.0f} tokens/s",
        f"{summary['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"used at the peak, mapped files included {summary['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"step 0: held-out {before['loss']:.4f}",
        f"held-out {after['loss']:.4f}",
        *summary["notes"],
    ):
        assert number in reported.words
    for sample in summary["samples"]:
        for name in ("question", "expected", "before", "after"):
            assert " ".join(str(escape(sample[name])).split()) in " ".join(reported.page.split())


def test_report_shows_every_curve_and_the_whole_configuration(reported: Reported) -> None:
    for title in ("Loss", "Learning rate", "Gradient norm", "Speed", "Memory by step", "Memory by purpose"):
        assert title in reported.words
    for words in ("Lengths of the data", "planned", "transformers", "train.max_steps 4 default -1", "Python"):
        assert words in reported.words
    for line in (reported.folder / "run.yaml").read_text().splitlines():
        assert str(escape(line)) in reported.page
    labels = [value for tag, name, value in reported.reading.attributes if (tag, name) == ("svg", "aria-label")]
    assert len(labels) == reported.reading.tags.count("svg") == 8
    assert any(re.match(r"Loss by step: train from [\d.]+ at step 1 to [\d.]+ at step 4;", label) for label in labels)


def test_report_of_a_run_without_held_out_examples(model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.jsonl"
    data.write_text("\n".join(json.dumps({"text": f"line {n} of a text"}) for n in range(12)))
    options = {"data.held_out_fraction": 0.0, "train.max_steps": 1, "lora.modules_to_save": ("norm",)}
    run_training(config_of(model_folder, data, tmp_path / "out", **options), console=Console(file=io.StringIO()))
    reported = read_report(tmp_path / "out")
    assert "nothing was held out" in reported.words
    assert "What it says" not in reported.words
    assert "smaller parts" not in reported.words


@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed: apt-get install chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_report_fits_the_screen(reported: Reported, tmp_path: Path, width: int) -> None:
    assert BROWSER is not None
    # A frame, since a headless window is never narrower than 500 pixels; the script that measures is the test's.
    page = re.sub(r'<meta http-equiv="Content[^>]*>', "", reported.page)
    measure = "<script>with (document.documentElement) document.title = scrollWidth - clientWidth</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", measure))
    frame = f'<iframe src="page.html" width="{width}" height="900" style="border:0"></iframe>'
    show = "onload = () => document.body.dataset.overflow = frames[0].document.title"
    (tmp_path / "frame.html").write_text(f"<body style='margin:0'>{frame}<script>{show}</script></body>")
    picture = tmp_path / "page.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        "--window-size=1200,900",
    ]
    command = [BROWSER, *options, f"--screenshot={picture}", str(tmp_path / "frame.html")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")
    command = [BROWSER, *options, "--dump-dom", str(tmp_path / "frame.html")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    assert 'data-overflow="0"' in shown


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (1.3, 2.9, (1.0, 1.5, 2.0, 2.5, 3.0)),
        (0.0, 2e-4, (0.0, 5e-5, 1e-4, 1.5e-4, 2e-4)),
        (0.0, 0.0, (0.0, 0.25, 0.5, 0.75, 1.0)),
        (-3, 5, (-4.0, -2.0, 0.0, 2.0, 4.0, 6.0)),
        (4.0, 4.0, (2.0, 3.0, 4.0, 5.0, 6.0)),
    ],
)
def test_make_axis_stands_on_round_numbers(low: float, high: float, ticks: tuple[float, ...]) -> None:
    axis = make_axis([low, high], start=100, end=0)
    assert axis.ticks == ticks
    assert (axis.at(axis.low), axis.at(axis.high)) == (100, 0)


def test_make_step_axis_has_whole_numbers_within_the_run() -> None:
    assert make_step_axis([1, 12], start=0, end=100).ticks == (2, 4, 6, 8, 10, 12)
    axis = make_step_axis([1], start=0, end=100)
    assert 0 < axis.at(1) < 100


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.25, "0.25"), (2e-4, "2e-4"), (1500, "1,500"), (20000, "20k"), (1.5e6, "1.5M"), (-0.5, "-0.5")],
)
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text
    assert short_number(5000, largest=15000) == "5k"


def test_curves_leave_out_what_is_not_finite_and_are_smoothed_without_lag() -> None:
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}, {"step": 3, "eval_loss": 1.0}]
    assert curve_of(history, "loss") == (Point(1, 2.0),)
    line = [Point(step, 2.0 * step) for step in range(60)]
    assert [point.value for point in smooth(line)[3:-3]] == pytest.approx([point.value for point in line[3:-3]])
    noisy = smooth([Point(step, 1.0 + (-1) ** step) for step in range(60)])
    assert all(abs(point.value - 1.0) < 0.35 for point in noisy[2:-2])
    assert smooth([]) == ()


def test_merge_small_keeps_the_sum() -> None:
    parts = tuple(Part(str(size), size) for size in range(10, 0, -1))
    merged = merge_small(parts)
    assert len(merged) == 6
    assert merged[-1] == Part("5 smaller parts", 15)
    assert sum(part.num_bytes for part in merged) == 55


def test_element_escapes_text_and_keeps_markup() -> None:
    assert element("p", "a < b", element("b", "&"), class_='"x"') == '<p class="&quot;x&quot;">a &lt; b<b>&amp;</b></p>'
