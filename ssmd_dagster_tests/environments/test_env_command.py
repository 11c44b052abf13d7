"""`ssmd env list|show|validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ssmd_dagster.cli.env import env_group
from ssmd_dagster.errors import ConfigurationError, ExitCode, NotFoundError, SsmdError
from ssmd_dagster_tests.environments.folders import changed, copied


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the shipped folder and a home of its own, both named by their variables."""
    exchanges = copied(tmp_path)
    monkeypatch.setenv("SSMD_EXCHANGES", str(exchanges))
    monkeypatch.setenv("SSMD_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSMD_ENV", raising=False)
    return exchanges


def run(*arguments: str) -> Result:
    """Run `ssmd env …`; errors of ours come back as the result's exception, for the CLI's main to print."""
    result = CliRunner().invoke(env_group, arguments)
    assert result.exception is None or isinstance(result.exception, SsmdError | SystemExit)
    return result


def plain(*arguments: str) -> Any:
    """The JSON that a command prints."""
    return json.loads(run(*arguments, "--json").stdout)


def test_list_has_one_line_per_environment() -> None:
    """Names, whether they are enabled, and their schedule."""
    result = run("list")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [
        "NAME                    ENABLED  FEED        TIMEZONE          START  END    STATUS",
        "kalshi-demo             no       kalshi      UTC               00:10  00:00  ok",
        "kalshi-prod             no       kalshi      UTC               00:10  00:00  ok",
        "kalshi-sim              yes      kalshi      UTC               00:10  00:00  ok",
    ]
    assert [row["name"] for row in plain("list")["environments"]] == ["kalshi-demo", "kalshi-prod", "kalshi-sim"]


def test_list_shows_broken_environments_too(folder: Path) -> None:
    """A broken file does not disappear from the list; the message goes to stderr."""
    changed(folder / "environments/kalshi-prod.yaml", {"retain_days": 0, "feed": 7})
    result = run("list")
    assert "kalshi-prod             -        -           -                 -      -      2 fault(s)" in result.stdout
    assert "ssmd env validate" in result.stderr
    assert plain("list")["environments"][1]["faults"] == 2


def test_show_names_credentials_and_never_prints_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables are named with whether they are set."""
    monkeypatch.setenv("KALSHI_API_KEY", "hunter2")
    monkeypatch.delenv("KALSHI_PRIVATE_KEY_PATH", raising=False)
    result = run("show", "kalshi-prod")
    assert result.exit_code == 0
    assert "credentials.kalshi.key_id: KALSHI_API_KEY (set)" in result.stdout
    assert "credentials.kalshi.private_key_path: KALSHI_PRIVATE_KEY_PATH (not set)" in result.stdout
    assert "schedule.day_end: 00:00" in result.stdout
    shown = plain("show", "kalshi-prod")
    assert shown["credentials"][0] == {"variable": "KALSHI_API_KEY", "credential": "kalshi.key_id", "set": True}
    assert shown["feed_versions"][0]["rate_limit_per_second"] == 20
    assert "hunter2" not in result.output + json.dumps(shown)


def test_show_defaults_to_the_variable_and_then_to_the_simulator(monkeypatch: pytest.MonkeyPatch) -> None:
    """SSMD_ENV, then kalshi-sim."""
    assert plain("show")["name"] == "kalshi-sim"
    monkeypatch.setenv("SSMD_ENV", "kalshi-demo")
    assert plain("show")["name"] == "kalshi-demo"
    assert plain("show", "kalshi-prod")["name"] == "kalshi-prod"


def test_validate_of_a_right_folder_says_so() -> None:
    """All environments, or the one that was asked for."""
    assert run("validate").stdout == "3 environments ok: kalshi-demo, kalshi-prod, kalshi-sim\n"
    assert run("validate", "kalshi-sim").stdout == "1 environment ok: kalshi-sim\n"
    assert plain("validate") == {
        "ok": True,
        "environments": ["kalshi-demo", "kalshi-prod", "kalshi-sim"],
        "faults": [],
    }


def test_validate_prints_every_fault_and_exits_with_8(folder: Path) -> None:
    """One line per fault in the error, the same as JSON on stdout; other environments stay right."""
    changed(folder / "environments/kalshi-prod.yaml", {"retain_days": 0, "schedule.day_start": "25:10"})
    result = run("validate")
    assert isinstance(result.exception, ConfigurationError)
    assert result.exception.exit_code is ExitCode.CONFIGURATION
    lines = str(result.exception).splitlines()
    path = folder / "environments/kalshi-prod.yaml"
    assert lines[1:] == [
        f'  {path}: schedule.day_start: got \'25:10\', expected HH:MM in quotes, "00:00" to "23:59"',
        f"  {path}: retain_days: got 0, expected at least 1",
    ]
    assert run("validate", "kalshi-sim").exception is None
    broken = run("validate", "kalshi-prod", "--json")
    assert isinstance(broken.exception, ConfigurationError)
    report = json.loads(broken.stdout)
    assert (report["ok"], report["environments"]) == (False, ["kalshi-prod"])
    assert report["faults"][1] == {
        "file": str(path),
        "key": "retain_days",
        "value": "0",
        "expected": "at least 1",
    }


@pytest.mark.parametrize("command", ["show", "validate"])
def test_an_unknown_environment_is_not_found(command: str) -> None:
    """Exit code 4 and the known names."""
    result = run(command, "../kalshi-sim")
    assert isinstance(result.exception, NotFoundError)
    assert "Known: kalshi-demo" in str(result.exception)


def test_show_of_a_broken_environment_lists_its_faults(folder: Path) -> None:
    """The same text as validate, since nothing may be shown of what is not understood."""
    changed(folder / "environments/kalshi-sim.yaml", {"capture.connections": 9})
    result = run("show", "kalshi-sim")
    assert isinstance(result.exception, ConfigurationError)
    assert "capture.connections: got 9, expected at most 2" in str(result.exception)
