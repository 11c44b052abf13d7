"""The folder of local state."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest

from ssmd_dagster.environments import home
from ssmd_dagster.errors import ConfigurationError, ExitCode


def test_the_home_is_made_for_its_owner_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SSMD_HOME is made with mode 0700, whatever the umask, and found again."""
    monkeypatch.setenv("SSMD_HOME", str(tmp_path / "a" / "b"))
    assert home.ssmd_home() == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert home.ssmd_home() == tmp_path / "a" / "b"


def test_a_relative_home_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes started elsewhere must find the same folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SSMD_HOME", "state")
    assert home.ssmd_home() == tmp_path / "state"


def test_without_the_variables_the_project_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """exchanges/ beside the package, also where the variable is empty."""
    monkeypatch.setenv("SSMD_EXCHANGES", "")
    assert home.exchanges_dir() == home.project_dir() / "exchanges"
    assert (home.exchanges_dir() / "feeds/kalshi.yaml").is_file()


def test_a_home_that_cannot_be_made_is_a_configuration_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the way: exit code 8, with the path and what to do."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("SSMD_HOME", str(path))
        with pytest.raises(ConfigurationError, match="Set SSMD_HOME") as caught:
            home.ssmd_home()
        assert caught.value.exit_code is ExitCode.CONFIGURATION
        assert caught.value.where == str(path)


def test_a_home_open_to_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials and sockets lie there, so group and others may have nothing; the text says what to run."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o755)
    monkeypatch.setenv("SSMD_HOME", str(tmp_path / "home"))
    with pytest.raises(ConfigurationError, match="chmod 700"):
        home.ssmd_home()


def test_the_layout_is_the_documented_one() -> None:
    """Every path that rooms share."""
    root = Path("/h")
    day = date(2025, 12, 14)
    assert home.spool_dir(root, "e", day) == home.spool_dir(root, "e", "2025-12-14") == Path("/h/spool/e/2025-12-14")
    assert home.segments_dir(root, "e", day) == Path("/h/segments/e/2025-12-14")
    assert home.simulator_dir(root, "e") == Path("/h/simulator/e")
    assert home.objects_dir(root) == Path("/h/objects")
    assert [
        path(root).name
        for path in (
            home.stack_file,
            home.secrets_file,
            home.supervisor_dir,
            home.nats_dir,
            home.cache_dir,
            home.dagster_dir,
            home.logs_dir,
            home.spool_root,
        )
    ] == ["stack.json", "secrets.env", "supervisor", "nats", "cache", "dagster", "logs", "spool"]
