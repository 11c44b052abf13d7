"""Every `ssmd …` that a message or a document tells somebody to run is a command that `ssmd` takes."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import click

from ssmd_dagster.cli import main
from ssmd_dagster.defs.ops import _next_command
from ssmd_dagster.defs.resources import VerbName
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.errors import ExitCode

DAY = "2026-01-02"
COMMAND = re.compile(r"`(ssmd [^`]*)`|(?<![`\w-])(ssmd (?:day|env|up|down|secmaster|data|sim|demo)\b[^`;)|\n…<]*)")
PLACEHOLDERS = {"ENV": "kalshi-sim", "NAME": "kalshi-sim", "D": DAY, "DATE": DAY, "D1": DAY, "D2": DAY, "TICKER": "T-1"}
PROSE = re.compile(r"[.,:]?(?: (?:ends|is|has|goes|tries|makes|and|or|to|then|stops|names|writes|later)\b.*)?[.,]?$")


def parse(line: str) -> None:
    """Read a command line as `ssmd` does, without running it; raise `click.UsageError` where it does not take it."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(line)][1:]
    command: click.Command = main.cli
    context = click.Context(command, info_name="ssmd")
    while isinstance(command, click.Group) and words:
        if words == ["--help"]:
            return
        found = command.get_command(context, words[0])
        if found is None:
            raise click.UsageError(f"no such command: {words[0]}")
        command, words = found, words[1:]
    if words:  # without any it is spoken of, not told to be run
        command.make_context("ssmd", words)


def commands_in(text: str) -> Iterator[str]:
    """Yield the command lines of a text."""
    for quoted, bare in COMMAND.findall(text):
        yield " ".join((quoted or PROSE.sub("", bare)).split())


def texts_of(path: Path) -> Iterator[str]:
    """Yield the strings of a module, dates and names put in where they are filled in at run time."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else _filled(part)
                for part in node.values
            )


def _filled(part: ast.expr) -> str:
    name = ast.unparse(part)
    if "verb" in name or " if " in name:
        return "…"
    return DAY if re.search(r"\b(date|day|first|last|wanted|parsed|DAY)\b(?!\.env)", name) else "kalshi-sim"


SOURCES = sorted((project_dir() / "ssmd_dagster").rglob("*.py"))
DOCUMENTS = [project_dir() / "README.md", *sorted((project_dir() / "docs").glob("*.md"))]


def test_every_command_of_a_message_or_a_document_is_one() -> None:
    """Its name, its options and its arguments are right; `{verb}`, `…`, `a|b` and `[ENV]` are left to whoever fills them in."""
    told = {(path.name, line) for path in SOURCES for text in texts_of(path) for line in commands_in(text)}
    told |= {(path.name, line) for path in DOCUMENTS for line in commands_in(path.read_text())}
    wrong = []
    for name, line in sorted(told):
        if any(sign in line for sign in "…|[{") or line == "ssmd":
            continue
        try:
            parse(line)
        except (click.UsageError, ValueError) as error:
            wrong.append(f"{name}: {line}: {error}")
    assert len(told) > 100
    assert wrong == []


def test_the_command_of_a_failed_run_is_one() -> None:
    """Whichever verb failed, and however."""
    for verb in (*get_args(VerbName), "backfill", "verify", None):
        for code in ExitCode:
            for date in (DAY, None):
                parse(_next_command(code, verb, "kalshi-sim", date))
