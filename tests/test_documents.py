"""What the documents say is true: their links lead somewhere, their code runs, what they show is what is printed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformers_kt.cli import build_app, doctor
from transformers_kt.cli.bench_report import OURS, BenchReport, Figure, Limits, Setting
from transformers_kt.cli.doctor import Diagnosis, Speeds
from transformers_kt.cli.machine import Rate, machine

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md"), ROOT / "csrc/README.md"]
)
FOLDERS = ("transformers_kt", "csrc", "benchmarks", "tests", "rules")
SUFFIXES = ("*.py", "*.h", "*.cpp", "*.yaml")
README_LINES = 120


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).exists()] == []


def test_the_readme_is_no_longer_than_a_landing_page() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_the_code_of_the_readme_runs_and_the_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    use, rules = blocks(ROOT / "README.md", "python")
    names: dict[str, object] = {}
    exec(use, names)
    assert "486 + 57 = 543" in capsys.readouterr().out
    exec(rules, names)
    assert {row.operation for row in names["model"].kt_report.rows} == {"experts_cpu", "torch"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("document", ["docs/plan.md", "docs/commands.md"])
def test_what_a_command_prints_is_what_the_documents_show(monkeypatch: pytest.MonkeyPatch, document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    command, shown = re.findall(r"```bash\ntransformers-kt ([^`]*?)\n```\n\n```\n(.*?)```", text, re.DOTALL)[0]
    monkeypatch.chdir(ROOT)
    free = re.compile(r"\S+ GB are free")
    said = CliRunner().invoke(build_app(), command.split()).output
    assert free.sub("", said) == free.sub("", shown)


def test_the_table_of_commands_has_all_of_them() -> None:
    table = re.findall(r"^\| \[`(\w+)`\]", (ROOT / "docs/commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(table) == {command.name for command in build_app().registered_commands}


def screen(heading: str) -> str:
    """What the document shows of a command, with # for every number: those are of one machine and day."""
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (shown,) = re.findall(r"\n\n```\n(.*?)\n```", section, re.DOTALL)
    return without_numbers(shown)


def without_numbers(text: str) -> str:
    return " ".join(re.sub(r"\d[\d.,]*(\+cpu)?", "#", re.sub("─+", "─", text)).split())


def test_the_screen_of_chat_is_what_chat_prints() -> None:
    said = CliRunner().invoke(build_app(), ["chat"], input="What is 486 + 57?\n/quit\n").output
    shown = screen("chat").removesuffix("> /quit").removeprefix("> What is # + #?").strip()
    assert shown in without_numbers(said)


def test_the_screen_of_bench_has_the_form_of_its_report() -> None:
    settings = [Setting(2, batch, prompt, None) for batch in (1, 4) for prompt in (128, 512)]
    settings += [Setting(2, batch, None, depth) for batch in (1, 4) for depth in (0, 1024)]
    bounds = ["multiplying"] * 4 + ["memory"] * 4
    figures = [Figure(OURS, *setting, (1.0, 2.0), 2.0, bound) for setting, bound in zip(settings, bounds, strict=True)]
    report = BenchReport("v2-lite-4-layers", {}, 385_000_000, {2: Limits(64.3e9, 591e9)}, figures)
    assert screen("bench") == without_numbers(str(report))


def test_the_screen_of_doctor_has_the_form_of_its_diagnosis() -> None:
    isas = ("avx512_vnni", "avx512", "avx2", "scalar")
    here = replace(machine(), cpu="AMD EPYC", isa=isas[0], isas=isas, cores=2, cpus=2, all_cpus=2, nodes=1, quota=0.0,
                   swap=0, huge_pages="madvise", free_ram_source="free memory of this machine", ram=25_300_000_000,
                   gpus=(), hand_offs=())  # fmt: skip
    speeds = Speeds([Rate(1, 20e9), Rate(2, 40e9)], 49.4e9, 589e9, 0.59e-3)
    diagnosis = Diagnosis(here, speeds, None, [*doctor._sentences(here, speeds, None)], [])
    assert screen("doctor") == without_numbers(str(diagnosis))


def test_every_journal_entry_that_is_cited_exists() -> None:
    journal = (ROOT / "benchmarks/JOURNAL.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (J\d+)\. ", journal, re.MULTILINE)
    assert len(set(entries)) == len(entries)
    files = [*DOCUMENTS, *(file for folder in FOLDERS for suffix in SUFFIXES for file in (ROOT / folder).rglob(suffix))]
    cited = {
        (str(file), entry) for file in files for entry in re.findall(r"\bJ\d+\b", file.read_text(encoding="utf-8"))
    }
    assert {(name, entry) for name, entry in cited if entry not in entries} == set()
