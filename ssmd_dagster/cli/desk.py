"""How a command gets at an environment's desk, and the arguments that commands share."""

from __future__ import annotations

import asyncio
import getpass
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import click

from ssmd_dagster.capture.setting import load_setting
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.workflows.desk import Desk, Report, open_desk, report_nothing

_T = TypeVar("_T")

DEFAULT_ENV = "kalshi-sim"
ENV_VARIABLE = "SSMD_ENV"

env_argument = click.argument("env", metavar="[ENV]", envvar=ENV_VARIABLE, default=DEFAULT_ENV)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
date_option = click.option(
    "--date", metavar="YYYY-MM-DD", help="Trading day, in the environment's timezone. Default: the current one."
)
day_argument = click.argument("words", metavar="[ENV] DATE", nargs=-1)
day_option = click.option("--date", metavar="YYYY-MM-DD", help="The same as DATE.")


def default_env() -> str:
    """Return the environment that is meant where none is named."""
    return os.environ.get(ENV_VARIABLE) or DEFAULT_ENV


def env_and_date(ctx: click.Context, words: Sequence[str], date: str | None) -> tuple[str, str]:
    """Return which environment and which day are meant by `[ENV] DATE` or `[ENV] --date DATE`."""
    meant = (*words, date) if date is not None else tuple(words)
    if not 1 <= len(meant) <= 2:
        raise click.UsageError("expected [ENV] DATE", ctx)
    return meant[0] if len(meant) == 2 else default_env(), parse_date(meant[-1]).isoformat()


def actor() -> str:
    """Return who the journal says acted from this command line."""
    return f"cli:{getpass.getuser()}@{socket.gethostname()}"


def with_desk(
    env: str, body: Callable[[Desk], Awaitable[_T]], report: Report = report_nothing, *, needs_cache: bool = True
) -> _T:
    """Run `body` with a desk of the environment, connected for its length; to look at days needs no cache."""
    setting = load_setting(env)

    async def run() -> _T:
        async with open_desk(setting, actor(), report, needs_cache=needs_cache) as desk:
            return await body(desk)

    return asyncio.run(run())
