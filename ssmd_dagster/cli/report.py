"""`ssmd day report`: a sealed day as one HTML page. No server is asked.

What it needs is imported when it is called, so that the other verbs of `ssmd day` stay quick.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from ssmd_dagster.cli.desk import day_argument, day_option, env_and_date, json_option
from ssmd_dagster.cli.output import message, print_json
from ssmd_dagster.errors import ConfigurationError


@click.command("report")
@day_argument
@day_option
@click.option("--to", type=click.Path(path_type=Path, dir_okay=False), help="Default: ENV-DATE.html in this folder.")
@click.option("--revision", type=click.IntRange(min=1), help="A sealed revision. Default: the latest.")
@json_option
@click.pass_context
def report_command(
    ctx: click.Context,
    words: tuple[str, ...],
    date: str | None,
    to: Path | None,
    revision: int | None,
    as_json: bool,
) -> None:
    """Write a sealed day as one HTML page: messages, coverage, gaps, latency, markets, ledger, drift."""
    from ssmd_dagster.archive.recorded import find
    from ssmd_dagster.archive.report import report

    env, date = env_and_date(ctx, words, date)

    def told(table: str) -> None:
        if sys.stderr.isatty():
            message(f"  counted {table}")

    html = report(find(env), date, revision=revision, told=told)
    path = to if to is not None else Path(f"{Path(env).name}-{date}.html")
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(
            f"cannot be written: {error.strerror}", where=str(path), do="Choose another file with --to"
        ) from error
    if as_json:
        print_json({"environment": env, "date": date, "file": str(path.absolute()), "bytes": len(html.encode())})
    else:
        click.echo(f"Report: {path.absolute()}")
