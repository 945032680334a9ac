"""What the documents say is true: their links lead somewhere, their code runs, what they show is what is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from transformers_kt.cli import build_app

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


def test_every_journal_entry_that_is_cited_exists() -> None:
    journal = (ROOT / "benchmarks/JOURNAL.md").read_text(encoding="utf-8")
    entries = re.findall(r"^## (J\d+)\. ", journal, re.MULTILINE)
    assert len(set(entries)) == len(entries)
    files = [*DOCUMENTS, *(file for folder in FOLDERS for suffix in SUFFIXES for file in (ROOT / folder).rglob(suffix))]
    cited = {
        (str(file), entry) for file in files for entry in re.findall(r"\bJ\d+\b", file.read_text(encoding="utf-8"))
    }
    assert {(name, entry) for name, entry in cited if entry not in entries} == set()
