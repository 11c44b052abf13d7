"""`ssmd secmaster`: the list of markets that an environment records. Parsing and printing only."""

from __future__ import annotations

import click
import msgspec

from ssmd_dagster.cli.desk import default_env, env_argument, json_option, with_desk
from ssmd_dagster.cli.output import print_json, rfc3339, thousands
from ssmd_dagster.workflows.secmaster import find, sync


@click.group("secmaster")
def secmaster_group() -> None:
    """Bring in and look at the list of markets."""


@secmaster_group.command("sync")
@env_argument
@json_option
def sync_command(env: str, as_json: bool) -> None:
    """Read the selected markets from the exchange."""
    result = with_desk(env, lambda desk: sync(desk, desk.today()))
    if as_json:
        print_json({"environment": env, **msgspec.to_builtins(result)})
        return
    click.echo(
        f"{thousands(result.total)} markets: {thousands(result.added)} new, {thousands(result.updated)} changed, "
        f"{thousands(result.settled)} settled"
    )


@secmaster_group.command("list")
@env_argument
@click.option("--category", help="Only markets of this category.")
@click.option("--series", help="Only markets of this series.")
@click.option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="How many markets.")
@json_option
def list_command(env: str, category: str | None, series: str | None, limit: int, as_json: bool) -> None:
    """List the markets of the security master."""
    markets = with_desk(env, lambda desk: find(desk, category=category, series=series))
    if as_json:
        print_json({"environment": env, "total": len(markets), "markets": msgspec.to_builtins(markets[:limit])})
        return
    click.echo(f"{'TICKER':<44}{'SERIES':<16}{'CATEGORY':<20}{'STATUS':<12}CLOSES")
    for market in markets[:limit]:
        row = f"{market.ticker:<44}{market.series_ticker:<16}{market.category:<20}{market.status:<12}"
        click.echo(row + rfc3339(market.close_ns))
    if len(markets) > limit:
        click.echo(f"{thousands(len(markets) - limit)} more; see --limit, --series, --category", err=True)


@secmaster_group.command("show")
@click.argument("words", metavar="[ENV] TICKER", nargs=-1)
@click.pass_context
@json_option
def show_command(ctx: click.Context, words: tuple[str, ...], as_json: bool) -> None:
    """Show one market as the exchange described it."""
    if not 1 <= len(words) <= 2:
        raise click.UsageError("expected [ENV] TICKER", ctx)
    env, ticker = words[0] if len(words) == 2 else default_env(), words[-1]
    market = with_desk(env, lambda desk: desk.stores.secmaster.get(ticker))
    if as_json:
        print_json({"environment": env, **msgspec.to_builtins(market)})
        return
    for title, text in (
        ("Ticker", market.ticker),
        ("Event", market.event_ticker),
        ("Series", market.series_ticker),
        ("Category", market.category),
        ("Title", market.title),
        ("Status", market.status),
        ("Opens", rfc3339(market.open_ns)),
        ("Closes", rfc3339(market.close_ns)),
    ):
        click.echo(f"{title}: {text}")
