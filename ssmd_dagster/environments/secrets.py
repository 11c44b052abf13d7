"""Credentials: the process's environment over `$SSMD_HOME/secrets.env`. They are never logged, journaled or shown.

The file holds `NAME=value` lines, empty lines and `#` comments; its mode is 0600. Which credential an environment needs
is in its YAML (`models.Keys`).
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from ssmd_dagster.environments.home import secrets_file
from ssmd_dagster.errors import ConfigurationError

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


class Secrets(dict[str, str]):
    """Environment variables by name; its text hides the values."""

    def __repr__(self) -> str:
        return f"Secrets({len(self)} hidden)"

    __str__ = __repr__


def load_secrets(home: Path) -> Secrets:
    """Return the process's environment variables over those of `secrets.env`; no file means none of its own.

    An empty variable counts as not set: the file's holds.

    Raises:
        ConfigurationError: The file cannot be read, is open to other users, or has a line that is no `NAME=value`.
    """
    return Secrets(_read(secrets_file(home)) | {name: value for name, value in os.environ.items() if value})


def add_secrets(home: Path, added: Mapping[str, str]) -> None:
    """Add or replace credentials in `secrets.env`: all or nothing, on disk when it returns, mode 0600.

    Comments of an existing file are lost. One writer at a time.

    Raises:
        ConfigurationError: The existing file is not as it should be.
        ValueError: A name or value cannot be written as one line.
    """
    for name, value in added.items():
        if not _NAME.match(name) or len(f"[{value}]".splitlines()) != 1 or "\0" in value or value != value.strip():
            raise ValueError(f"{name!r} or its value cannot be written as one line")
    path = secrets_file(home)
    lines = [f"{name}={_quoted(value)}\n" for name, value in {**_read(path), **added}.items()]
    descriptor, temporary = tempfile.mkstemp(prefix=".secrets-", dir=home)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("".join(lines))
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
    folder = os.open(home, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _quoted(value: str) -> str:
    """Quote what the reader would otherwise unquote."""
    return f"'{value}'" if value[:1] in ("'", '"') else value


def _read(path: Path) -> dict[str, str]:
    try:
        mode = path.stat().st_mode & 0o777
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError("the file of credentials cannot be read", where=str(path)) from error
    if mode & 0o077:
        raise ConfigurationError(
            f"the file of credentials is open to other users (mode {mode:04o})",
            where=str(path),
            do=f"Run: chmod 600 {path}",
        )
    found: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.strip().removeprefix("export ").partition("=")
        if not equals or not _NAME.match(name):
            raise ConfigurationError(
                "a line of the file of credentials is not NAME=value",
                where=f"{path}, line {number}",
                do="Correct or remove that line",
            )
        if len(value) >= 2 and value[0] == value[-1] and value[0] in ("'", '"'):
            value = value[1:-1]
        found[name] = value
    return found
