"""``transformers-kt bench``: every setting is measured in every round, limits follow from the work, rounds merge."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

import transformers_kt._C as _C
from transformers_kt import plan
from transformers_kt.assets import bundled_model
from transformers_kt.cli import alternating, bench_report, build_app, pictures, timing
from transformers_kt.cli import bench as module
from transformers_kt.cli.alternating import LLAMA_CPP
from transformers_kt.cli.bench import _Work, bench
from transformers_kt.cli.bench_report import OURS, BenchReport, Figure, Limits, Setting
from transformers_kt.errors import InputError, UnsupportedOperationError

MODEL = str(bundled_model())
LLAMA_CPP_MODULE = """
import time
from . import llama_cpp
class Llama:
    def __init__(self, path, **options):
        self._ctx = type("Context", (), {"ctx": None})
        self.repacked = llama_cpp.llama_model_default_params().use_extra_bufts
    def eval(self, tokens):
        time.sleep((0.001 if self.repacked else 0.004) * len(tokens))
    def reset(self):
        pass
    close = reset
def llama_synchronize(context):
    pass
"""
LLAMA_CPP_BINDINGS = """
class llama_model_params:
    use_extra_bufts = True
llama_model_default_params = llama_model_params
"""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits of a machine that need not be measured."""
    monkeypatch.setattr(module.ReadableMemory, "bandwidth", lambda self, cpus, rounds: 1e10 * len(cpus))
    monkeypatch.setattr(module, "DecodeRates", lambda: SimpleNamespace(sample=lambda: [1e9]))
    monkeypatch.setattr(module, "product_rate", lambda: 1e11)


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(build_app(), ["bench", *args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def test_every_setting_is_measured_in_every_round(quick: None) -> None:
    before = _C.thread_count()
    report = bench(MODEL, prompts=[16, 64], depths=[0, 32], batches=[1, 2], threads=[1, 2], new_tokens=2, rounds=2)
    shapes = [(prompt, None) for prompt in (16, 64)] + [(None, depth) for depth in (0, 32)]
    expected = {Setting(*each[:2], *each[2]) for each in itertools.product((1, 2), (1, 2), shapes)}
    assert {figure.setting for figure in report.figures} == expected
    assert all(len(figure.rounds) == 2 and min(figure.rounds) > 0 for figure in report.figures)
    assert {count: limits.read for count, limits in report.limits.items()} == {1: 1e10, 2: 2e10}
    assert _C.thread_count() == before


def test_a_token_takes_the_time_that_the_clock_shows(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(model: Any, prompts: list[list[int]], new_tokens: int) -> timing.Timed:
        return timing.Timed(0.5, [0.25] * new_tokens, [])

    monkeypatch.setattr(timing, "timed_generate", slow)
    report = bench(MODEL, prompts=[64], depths=[0], batches=[4], threads=[1], new_tokens=2, rounds=1)
    assert [figure.median for figure in report.figures] == [4 * 64 / 0.5, 4 / 0.25]


def test_generate_is_timed_from_the_prompt_to_the_first_token_and_between_tokens() -> None:
    class Model:
        def generate(self, ids: Any, *, stopping_criteria: Any, max_new_tokens: int, **options: Any) -> None:
            assert tuple(ids.shape) == (2, 3)
            for pause in [0.2, *[0.05] * (max_new_tokens - 1)]:
                time.sleep(pause)
                assert not stopping_criteria[0](ids, None).any()

    ticks: Iterator[int] = itertools.count()
    timed = timing.timed_generate(Model(), [[1, 2, 3]] * 2, 4, spent=lambda: next(ticks))
    assert 0.2 <= timed.first < 1
    assert len(timed.gaps) == 4
    assert min(timed.gaps) >= 0.05
    assert timed.spent == [1, 1, 1, 1]


def test_a_token_reads_what_the_plan_says_and_a_batch_each_expert_once() -> None:
    work = _Work.of(MODEL, 2 / 8)
    assert work.bytes_per_token == pytest.approx(plan(MODEL, gpus=[]).devices[0].read_per_token, rel=0.001)
    # Only memory: products take no time here.
    limits = Limits(read=1.0, products=1e30)
    one, bound = work.limit(Setting(1, 1, None, 0), limits)
    assert bound == "memory"
    assert one == pytest.approx(1 / work.bytes_per_token)
    many, _ = work.limit(Setting(1, 1000, None, 0), limits)
    assert many == pytest.approx(1000 / (work.others + work.routed))  # all experts, once
    deep, _ = work.limit(Setting(1, 1, None, 100), limits)
    # Latents and ropes of 4 layers, 288 float32 values a token.
    assert 1 / deep - 1 / one == pytest.approx(100 * 4 * 288 * 4)


def test_a_long_prompt_is_bound_by_its_products() -> None:
    work = _Work.of(MODEL, 2 / 8)
    speed, bound = work.limit(Setting(1, 1, 1000, None), Limits(read=1e30, products=2.0))
    assert bound == "multiplying"
    # 4.17 million weights a token; of these the embedding multiplies nothing, the head the last token alone.
    inside = 4_170_000 - 2 * 512 * 256
    assert 1 / speed == pytest.approx(inside + 512 * 256 / 1000, rel=0.01)


def test_markdown_and_json_hold_the_same(quick: None) -> None:
    args = ("--prompt", "16", "--depth", "0", "--new-tokens", "2", "--rounds", "1")
    said = json.loads(run(MODEL, "--json", *args)[1])
    assert [(each["prompt"], each["depth"]) for each in said["figures"]] == [(16, None), (None, 0)]
    markdown = run(MODEL, "--markdown", *args)[1]
    assert "| what | threads | batch | tokens/s | rounds apart | of the limit | bound by |" in markdown
    assert "| prompt of 16 |" in markdown
    assert "tiny-r1: a token reads 2.51 MB of weights" in markdown


@pytest.mark.parametrize(
    ("args", "code"),
    [(("--prompt", "1,x"), 2), (("--prompt", "0"), 2), (("--depth", "-1"), 2), (("--json", "--markdown"), 2)],
)
def test_a_command_line_that_is_not_understood_ends_with_2(args: tuple[str, ...], code: int) -> None:
    assert run(MODEL, *args)[0] == code


def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ours", None)
    with pytest.raises(InputError, match="this model has 2048 positions"):
        bench(MODEL, prompts=[2048])
    with pytest.raises(InputError, match=r"against='vllm'; llama\.cpp is accepted"):
        bench(MODEL, against="vllm")
    with pytest.raises(UnsupportedOperationError, match="pip install llama-cpp-python, or give the interpreter"):
        bench(MODEL, against=LLAMA_CPP, llama_python=str(shutil.which("false")))
    with pytest.raises(InputError, match=r"llama_python='/nowhere': .*; a Python interpreter is accepted"):
        bench(MODEL, against=LLAMA_CPP, llama_python="/nowhere")


def test_both_ways_of_llama_cpp_are_measured_in_turns_on_the_same_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = tmp_path / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(LLAMA_CPP_MODULE)
    (package / "llama_cpp.py").write_text(LLAMA_CPP_BINDINGS)
    facts = tmp_path / "llama_cpp_python-0.3.36.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: 0.3.36\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    figures = [
        Figure(OURS, 1, 1, 20, None, (50.0,), 100.0, "memory"),
        Figure(OURS, 1, 1, None, 0, (5.0,), 9.0, "memory"),
    ]
    ours = BenchReport("tiny-r1", {"CPU": "x"}, 1, {1: Limits(1.0, 1.0)}, figures).to_dict()
    run_really, started = alternating._json_of, []

    def json_of(command: Any, name: str) -> Any:
        started.append(name)
        return json.loads(json.dumps(ours)) if name == "bench" else run_really(command, name)

    monkeypatch.setattr(alternating, "_json_of", json_of)
    report = bench(MODEL, prompts=[20], depths=[0], threads=[1], new_tokens=3, rounds=2, against=LLAMA_CPP)
    assert started == ["bench", "llama.cpp repacked", "llama.cpp tiled"] * 2
    theirs = {(figure.engine, figure.setting): figure for figure in report.figures}
    repacked, tiled = (theirs[f"llama.cpp {way}", Setting(1, 1, 20, None)] for way in ("repacked", "tiled"))
    assert len(repacked.rounds) == len(tiled.rounds) == 2
    assert 200 < repacked.median < 1000  # it sleeps a millisecond a token
    assert 50 < tiled.median < 250
    assert 100 < theirs["llama.cpp repacked", Setting(1, 1, None, 0)].median < 1000
    assert report.about["llama.cpp"] == "llama-cpp-python 0.3.36"
    assert f"| {50 / repacked.median:.2f} |" in report.markdown()
    assert "Ratio: ours over the best of llama.cpp repacked, llama.cpp tiled." in str(report)


def test_rounds_of_several_processes_become_one_report() -> None:
    def report(speed: float, limit: float) -> Any:
        figure = Figure(OURS, 1, 1, 20, None, (speed,), limit, "memory")
        return BenchReport("m", {"CPU": "x"}, 1, {1: Limits(limit, 1.0)}, [figure]).to_dict()

    reports = [json.loads(json.dumps(report(*each))) for each in ((50.0, 90.0), (70.0, 80.0))]
    merged = alternating.merged("m", reports, {}, "1.0")
    (figure,) = merged.figures
    assert (figure.median, figure.limit, merged.limits[1].read) == (60.0, 90.0, 90.0)
    assert figure.spread == pytest.approx(20 / 60)


def test_a_picture_is_written_for_few_and_for_many_settings(tmp_path: Path) -> None:
    for settings in ([Setting(1, 1, 20)], [Setting(1, batch, None, depth) for batch in (1, 2, 4) for depth in (0, 9)]):
        figures = [Figure(OURS, *setting, (5.0, 6.0), 9.0, "memory") for setting in settings]
        path = tmp_path / f"{len(settings)}.png"
        BenchReport("m", {"CPU": "x"}, 1, {1: Limits(1.0, 1.0)}, figures).plot(str(path))
        assert path.stat().st_size > 1000


def test_the_legend_of_all_engines_lies_within_the_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures = [
        Figure(engine, 2, 1, prompt, 0 if prompt is None else None, (5.0,), None, None)
        for engine in (OURS, *alternating.LLAMA_CPP_WAYS.values())
        for prompt in (20, None)
    ]
    made: list[Any] = []

    def new_figure(*args: Any, **options: Any) -> Any:
        made.append(pictures.new_figure(*args, **options))
        return made[-1]

    monkeypatch.setattr(bench_report, "new_figure", new_figure)
    BenchReport("m", {"CPU": "x"}, 1, {2: Limits(1.0, 1.0)}, figures).plot(str(tmp_path / "x.png"))
    ((drawn, _),) = made
    box, whole = drawn.legends[0].get_window_extent(), drawn.bbox
    assert whole.x0 <= box.x0 < box.x1 <= whole.x1
    assert whole.width == 800


def test_the_peer_imports_nothing_but_the_standard_library() -> None:
    source = Path(str(alternating.peer.__file__)).read_text()
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= set(sys.stdlib_module_names)
