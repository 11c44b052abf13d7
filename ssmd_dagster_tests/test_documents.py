"""What README and docs tell a reader to do works as it stands there, the demo first of all."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import psutil
import pytest

from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.payloads import ConditionValue
from ssmd_dagster.day.states import DayState
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.environments.models import EXCHANGE_KEY_FIELDS, KEY_FIELDS, Model
from ssmd_dagster.workflows.alerts import Kind

DOCUMENTS = [project_dir() / "README.md", *sorted((project_dir() / "docs").glob("*.md"))]
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
COMMAND_TIMEOUT_S = 170.0


def _blocks(document: Path, language: str) -> list[str]:
    return [match[3] for match in BLOCK.finditer(document.read_text()) if match[2] == language]


def _commands(document: Path, program: str) -> list[list[str]]:
    lines = [line.strip() for block in _blocks(document, "console") for line in block.splitlines()]
    return [shlex.split(line[2:]) for line in lines if line.startswith(f"$ {program} ")]


def _ssmd(words: list[str], home: Path) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("SSMD_", "DAGSTER_"))}
    return subprocess.run(
        [sys.executable, "-m", "ssmd_dagster.cli.main", *words],
        env={**variables, "SSMD_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
        check=False,
    )


def _left_over(home: Path) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SSMD_HOME", "").startswith(str(home)):
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private home."""
    folder = tmp_path_factory.mktemp("documents")
    folder.chmod(0o700)
    return folder


@pytest.fixture(scope="module")
def demo(home: Path) -> dict[str, Any]:
    """What `ssmd demo` printed."""
    done = _ssmd(["demo", "--json"], home)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


def test_the_demo_runs_two_days_through_dagster_and_leaves_nothing_running(demo: dict[str, Any], home: Path) -> None:
    """Yesterday is started and rolled by runs of Dagster's, today is ended; both are COMPLETE, verified and sealed."""
    assert demo["as_they_should"] is True
    second, first = demo["days"]
    for day in (first, second):
        assert (day["state"], day["condition"], day["gaps"]) == ("COMPLETE", "available", [])
        assert day["messages"] > 1_000
        for sheet in day["ledger"]["channels"]:
            assert sheet["received"] == sheet["spooled"] == sheet["published"] == sheet["archived"]
    assert first["date"] < second["date"]
    assert {Path(name).name for name in demo["raw_files"]} >= {"manifest.json", "trades-00.jsonl.zst"}
    assert _left_over(home) == []


def test_the_python_in_the_readme_reads_a_day(demo: dict[str, Any], home: Path) -> None:
    """The README's examples in Python run on the demo's files."""
    folder, date = Path(demo["raw_files"][0]).parent, demo["days"][1]["date"]
    for block in _blocks(project_dir() / "README.md", "python"):
        source = block.replace("…", str(folder)).replace("duckdb.sql(", "duckdb.connect().execute(") + "\n"
        source = source.replace("2025-12-14", date).replace("2025-12-01", date).replace("2025-12-31", date)
        done = subprocess.run(
            [sys.executable, "-c", source],
            env={**os.environ, "SSMD_HOME": str(home / "demo")},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_commands_in_the_documents_work(document: Path, home: Path) -> None:
    """Every `ssmd` command that a document shows, in its order, ends with exit code 0."""
    commands = [words[1:] for words in _commands(document, "ssmd") if words[1] not in ("sim", "demo")]
    try:
        for words in commands:
            done = _ssmd(words, home / "commands" if (home / "commands").exists() else _fresh(home / "commands"))
            assert done.returncode == 0, f"ssmd {' '.join(words)}\n{done.stdout}{done.stderr}"
    finally:
        if commands:
            _ssmd(["down"], home / "commands")
    assert _left_over(home) == []


def _fresh(folder: Path) -> Path:
    folder.mkdir(mode=0o700)
    return folder


def test_the_make_targets_in_the_readme_exist() -> None:
    """`make` knows every target that the documents name."""
    targets = {words[1] for document in DOCUMENTS for words in _commands(document, "make")}
    assert {"demo", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=project_dir(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_links_between_documents_lead_somewhere() -> None:
    """Relative links in README and docs name files that exist."""
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_key_of_the_configuration_is_documented() -> None:
    """The page of environments names each field of each model, as it is written in YAML, and each field of credentials."""
    text = re.sub("```.*?```", "", (project_dir() / "docs" / "environments.md").read_text(), flags=re.DOTALL)
    named = {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}
    found, fields = list(Model.__subclasses__()), set(EXCHANGE_KEY_FIELDS).union(*KEY_FIELDS.values(), KEY_FIELDS)
    for model in found:
        found += model.__subclasses__()
        fields |= {field.alias or name for name, field in model.model_fields.items()}
    assert len(found) > 10
    assert fields <= named


def _first_cells(heading: str) -> set[str]:
    """Return what stands in the first column of the table under a heading of the operations guide."""
    text = (project_dir() / "docs" / "operations.md").read_text()
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {row.split("|")[1].strip() for row in section.splitlines() if row.startswith("|")}


def test_the_runbook_has_a_row_for_every_state_cause_and_alert() -> None:
    """Nothing that the code can say is left without what to do about it, and nothing is explained that no code says."""
    causes = {word for cell in _first_cells("Causes of gaps") for word in re.findall(r"`(\w+)`", cell)}
    assert causes == set(GapCause)
    assert _first_cells("Alerts") - {"kind", "---"} == {kind.upper() for kind in get_args(Kind)}
    states = {cell.partition(",")[0] for cell in _first_cells("A runbook by state")} - {"state", "---"}
    assert states == set(DayState)
    conditions = {word for cell in _first_cells("A runbook by state") for word in re.findall(r"`(\w+)`", cell)}
    assert conditions == set(get_args(ConditionValue)) - {"available"}
