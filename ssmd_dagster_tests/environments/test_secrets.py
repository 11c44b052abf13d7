"""Credentials in the environment and in secrets.env."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmd_dagster.environments.home import secrets_file
from ssmd_dagster.environments.secrets import add_secrets, load_secrets
from ssmd_dagster.errors import ConfigurationError


def written(tmp_path: Path, text: str, mode: int = 0o600) -> Path:
    """A home with that secrets.env."""
    secrets_file(tmp_path).write_text(text, encoding="utf-8")
    secrets_file(tmp_path).chmod(mode)
    return tmp_path


def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are seen, and a variable that is set replaces the file's; an empty one is as good as none."""
    monkeypatch.setenv("SSMD_TEST_A", "from the environment")
    monkeypatch.setenv("SSMD_TEST_C", "")
    home = written(
        tmp_path, "SSMD_TEST_A=from the file\n# a note\n\nexport SSMD_TEST_B='quoted value'\nSSMD_TEST_C=a=b\n"
    )
    secrets = load_secrets(home)
    assert secrets["SSMD_TEST_A"] == "from the environment"
    assert secrets["SSMD_TEST_B"] == "quoted value"
    assert secrets["SSMD_TEST_C"] == "a=b"


def test_no_file_is_no_error(tmp_path: Path) -> None:
    """A machine that has everything in its environment needs no file."""
    assert dict(load_secrets(tmp_path)) == {name: value for name, value in os.environ.items() if value}


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    """Any permission for group or others is a configuration error that says what to run."""
    with pytest.raises(ConfigurationError, match="chmod 600"):
        load_secrets(written(tmp_path, "A=b\n", mode))


@pytest.mark.parametrize("line", ["hunter2", "MY NAME=hunter2", "=hunter2", "9A=hunter2"])
def test_a_wrong_line_is_named_without_its_content(tmp_path: Path, line: str) -> None:
    """The line's number is told, never what stands in it."""
    with pytest.raises(ConfigurationError, match="line 2") as caught:
        load_secrets(written(tmp_path, f"A=b\n{line}\n"))
    assert "hunter2" not in str(caught.value)


def test_secrets_hide_themselves(tmp_path: Path) -> None:
    """Neither repr nor str nor a format shows a value."""
    secrets = load_secrets(written(tmp_path, "SSMD_TEST=hunter2\n"))
    assert "hunter2" not in f"{secrets!r} {secrets} {secrets:}"


def test_added_secrets_join_those_that_are_there(tmp_path: Path) -> None:
    """New ones are added, known ones replaced, the file is 0600 and nothing is left beside it."""
    add_secrets(tmp_path, {"SSMD_TEST_A": "1", "SSMD_TEST_B": "2"})
    add_secrets(tmp_path, {"SSMD_TEST_B": "3"})
    secrets = load_secrets(tmp_path)
    assert (secrets["SSMD_TEST_A"], secrets["SSMD_TEST_B"]) == ("1", "3")
    assert secrets_file(tmp_path).stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["secrets.env"]


@pytest.mark.parametrize("added", [{"A": "x\ny"}, {"A": "x\0"}, {"A B": "x"}, {"A": " x"}, {"A": "\x85x\u2028"}])
def test_what_is_no_line_is_not_written(tmp_path: Path, added: dict[str, str]) -> None:
    """A value that could smuggle in another line is refused and leaves the file alone."""
    add_secrets(tmp_path, {"SSMD_TEST": "1"})
    before = secrets_file(tmp_path).read_bytes()
    with pytest.raises(ValueError, match="one line"):
        add_secrets(tmp_path, added)
    assert secrets_file(tmp_path).read_bytes() == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(st.text(max_size=12))
def test_a_value_is_read_as_it_was_written(tmp_path: Path, value: str) -> None:
    """Quotes, equals signs and hashes survive; what cannot is refused."""
    try:
        add_secrets(tmp_path, {"SSMD_TEST": value})
    except ValueError:
        return
    assert load_secrets(tmp_path)["SSMD_TEST"] == value
