"""`ssmd demo`: a whole trading day on this machine. Printing only; what it does is in `workflows/demo.py`."""

from __future__ import annotations

import asyncio
import os
import time

import click

from ssmd_dagster.cli.day_lines import print_day, print_history
from ssmd_dagster.cli.desk import actor
from ssmd_dagster.cli.output import print_json
from ssmd_dagster.clock import system_clock
from ssmd_dagster.environments.home import exchanges_dir, project_dir, ssmd_home
from ssmd_dagster.errors import ExitCode
from ssmd_dagster.workflows import demo


@click.command("demo")
@click.option("--json", "as_json", is_flag=True, help="Print JSON at the end.")
def demo_command(as_json: bool) -> int:
    """Run a whole trading day on a simulated exchange, in about a minute; nothing is left running.

    Its home is `demo` in SSMD_HOME; the last demo's files stay there until the next one.
    """
    home = ssmd_home() / "demo"
    os.environ["SSMD_HOME"] = str(home)
    os.environ["SSMD_EXCHANGES"] = str(project_dir() / "exchanges")
    began = time.monotonic()

    def tell(line: str) -> None:
        click.echo(f"{time.monotonic() - began:6.1f}s  {line}", err=as_json)

    result = asyncio.run(demo.run(home, exchanges_dir(), actor(), system_clock, tell))
    first = result.days[-1]
    if as_json:
        print_json(
            {
                "as_they_should": result.as_they_should,
                "home": str(home),
                "days": [view.to_json(demo.ENVIRONMENT) for view in result.days],
                "raw_files": [str(path) for path in result.raw_files],
            }
        )
        return int(ExitCode.OK if result.as_they_should else ExitCode.FAILURE)
    click.echo(f"\n$ ssmd day show {demo.ENVIRONMENT} {first.day.date}")
    print_day(demo.ENVIRONMENT, first)
    click.echo(f"\n$ ssmd day history {demo.ENVIRONMENT}")
    print_history(result.days)
    click.echo("\nFiles:")
    for path in result.raw_files:
        click.echo(f"  {path}  {path.stat().st_size:,} bytes")
    trades = next((path for path in result.raw_files if path.name.startswith("trades-")), result.raw_files[0])
    query = f"select count(*), min(recv_ns), max(recv_ns) from read_json('{trades.parent}/trades-*.jsonl.zst')"  # noqa: S608 - printed, not run
    click.echo("\nRead them, for example with DuckDB:")
    click.echo(f'  .venv/bin/python -c "import duckdb; print(duckdb.sql(\\"{query}\\"))"')
    tables = (
        f"import ssmd_dagster as ssmd; print(ssmd.load('{home}/objects', '{first.day.date}', 'trade', engine='pandas'))"
    )
    click.echo("\nIts tables, in Python and on the command line:")
    click.echo(f'  .venv/bin/python -c "{tables}"')
    click.echo(f"  SSMD_HOME={home} .venv/bin/ssmd data inventory {demo.ENVIRONMENT}")
    click.echo(f"  SSMD_HOME={home} .venv/bin/ssmd day report {demo.ENVIRONMENT} {first.day.date}")
    click.echo(
        f"\nThe whole stack, to click through: {'make up' if (project_dir() / 'Makefile').exists() else 'ssmd up'}"
    )
    if not result.as_they_should:
        click.echo("The days did not end as they should; see above.", err=True)
        return int(ExitCode.FAILURE)
    return int(ExitCode.OK)
