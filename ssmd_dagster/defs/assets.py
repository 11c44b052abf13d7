"""An environment's assets: what its days hold, partitioned by day and keyed `[environment, name]`.

Dagster makes none of them: the journal says what became of a day, whoever did it, and the journal sensor puts it here. Every
transition is an observation; a COMPLETE day is materialised, so a green partition is a complete day. The answers of the checks
are in `checks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from ssmd_dagster.archive.pictures import markdown
from ssmd_dagster.day.events import Gap, TradingDay
from ssmd_dagster.day.ledger import Ledger
from ssmd_dagster.day.states import DayState, EventName
from ssmd_dagster.defs.partitions import trading_days
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.workflows.follow import News
from ssmd_dagster.workflows.holdings import Holding, Holdings

Metadata = dict[str, dg.MetadataValue[Any]]

_DESCRIPTIONS = {
    "trading_day": "A trading day: its state, condition, ledger and gaps. Every transition of the journal is an observation, "
    "COMPLETE a materialisation.",
    "security_master": "The markets that the environment records, as the exchange lists them.",
    "raw": "Everything that came off the socket, as it came: zstd-compressed JSON lines.",
    "trades": "The day's trades as a table.",
    "orderbook": "The day's order book changes and snapshots as a table.",
    "coverage": "When each channel was recorded, and every gap with its cause.",
}
_BEFORE = {
    "trading_day": ("raw", "trades", "orderbook", "coverage"),
    "security_master": (),
    "raw": ("security_master",),
    "trades": ("raw",),
    "orderbook": ("raw",),
    "coverage": ("raw",),
}
_KINDS = {
    "trades": {"parquet", "table"},
    "orderbook": {"parquet", "table"},
    "coverage": {"parquet", "table"},
    "raw": {"json"},
}
_LEDGER_COLUMNS = (
    *("received", "spooled", "published", "archived", "normalised", "duplicates", "control", "rejected_total"),
    *("other_day", "opening_fold"),
)
MOST_GAPS_SHOWN = 100


def key_of(environment: Environment, name: str) -> dg.AssetKey:
    """Return the key of one of an environment's assets."""
    return dg.AssetKey([environment.name, name])


def assets_of(environment: Environment) -> list[dg.AssetSpec]:
    """Return the assets of an environment."""
    days = trading_days(environment)
    return [
        dg.AssetSpec(
            key_of(environment, name),
            deps=[key_of(environment, before) for before in _BEFORE[name]],
            description=description,
            group_name=environment.slug,
            kinds=_KINDS.get(name),
            partitions_def=days,
            tags={"ssmd/environment": environment.name},
        )
        for name, description in _DESCRIPTIONS.items()
    ]


def is_made(news: News) -> bool:
    """Say whether an event gives a day its files: the seal of a revision, or the completion of a forced day, which has none."""
    return news.event.event in (EventName.COMPLETED, EventName.SEALED) and _stands(news.day)


def is_judged(news: News) -> bool:
    """Say whether an event changes what may be claimed of a day that stands."""
    found = news.event.event in (EventName.VERIFIED, EventName.CONDITION_CHANGED) and _stands(news.day)
    return found or is_made(news)


def _stands(day: TradingDay | None) -> bool:
    return day is not None and day.state is DayState.COMPLETE and not day.is_unsealed


def observation(environment: Environment, news: News) -> dg.AssetObservation:
    """Return an event of the journal as the catalog shows it."""
    event, day = news.event, news.day
    arrow = f"{event.from_ or 'new'} → {event.to}" if event.to is not None else event.event.value
    metadata: Metadata = {
        "event": dg.MetadataValue.text(event.event.value),
        "actor": dg.MetadataValue.text(event.actor),
        "at": dg.MetadataValue.timestamp(event.at_ns / 1e9),
        "journal_sequence": dg.MetadataValue.int(news.seq),
    }
    if event.reason:
        metadata["reason"] = dg.MetadataValue.text(event.reason)
    if day is not None:
        metadata["state"] = dg.MetadataValue.text(day.state.value)
        metadata["epoch"] = dg.MetadataValue.text(str(day.epoch))
        if day.error and day.state in (DayState.ERROR, DayState.FAILED):
            metadata["error"] = dg.MetadataValue.text(day.error)
    if event.event in (EventName.GAP_OPENED, EventName.GAP_CLOSED):
        metadata["gap"] = dg.MetadataValue.json(event.data)
    is_gap = event.event in (EventName.GAP_OPENED, EventName.GAP_CLOSED)
    return dg.AssetObservation(
        key_of(environment, "coverage" if is_gap else "trading_day"),
        description=arrow,
        metadata=metadata,
        partition=event.date,
    )


def materialisations(
    environment: Environment, day: TradingDay, held: Holdings, pictures: Mapping[str, str]
) -> Iterable[dg.AssetMaterialization]:
    """Return a COMPLETE day as materialisations of all its assets; `pictures` are SVG by name."""
    ledger = None if day.ledger is None else Ledger.from_json(day.ledger)
    rows = {} if ledger is None else {sheet.channel: sheet for sheet in ledger.channels}

    def made(name: str, metadata: Metadata) -> dg.AssetMaterialization:
        head: Metadata = {
            "day": dg.MetadataValue.text(day.date),
            "revision": dg.MetadataValue.int(day.revision),
            "condition": dg.MetadataValue.text(day.condition or ""),
        }
        if held.error is not None:
            head["store"] = dg.MetadataValue.text(held.error)
        return dg.AssetMaterialization(
            key_of(environment, name),
            description=f"{day.date} is {day.state}, {day.condition}",
            metadata={**head, **metadata},
            partition=day.date,
        )

    def table(name: str, channel: str) -> Metadata:
        sheet = rows.get(channel)
        count = None if sheet is None else sheet.archived if sheet.normalised is None else sheet.normalised
        what = "records (not normalised)" if sheet is None or sheet.normalised is None else "rows"
        metadata: Metadata = {} if count is None else {"dagster/row_count": dg.MetadataValue.int(count)}
        metadata["counted"] = dg.MetadataValue.text(what)
        return metadata | stored(name)

    def stored(name: str) -> Metadata:
        return _size(held.tables.get(name)) | _place(held.table_urls.get(name))

    yield made("security_master", _known({"markets": held.markets}) | stored("security_master"))
    archived = sum(sheet.archived or 0 for sheet in rows.values())
    raw: Metadata = {"dagster/row_count": dg.MetadataValue.int(archived)} if rows else {}
    yield made("raw", raw | _raw_sizes(held) | _place(held.raw_url or day.archive_url) | _drawn(pictures, "latency"))
    yield made("trades", table("trade", "trade") | _drawn(pictures, "markets"))
    yield made("orderbook", table("orderbook", "orderbook_delta"))
    coverage: Metadata = {"gaps": dg.MetadataValue.int(len(day.gaps))}
    if day.gaps:
        coverage["gap_table"] = gap_table(day.gaps)
    yield made("coverage", coverage | stored("coverage") | _drawn(pictures, "coverage"))
    yield made("trading_day", _of_day(day, ledger) | _drawn(pictures, "messages", "coverage", "latency", "markets"))


def _drawn(pictures: Mapping[str, str], *names: str) -> Metadata:
    """Return the pictures of these names as one entry, which the UI opens at a click."""
    wanted = {name: pictures[name] for name in names if name in pictures}
    return {"pictures": dg.MetadataValue.md(markdown(wanted))} if wanted else {}


def _of_day(day: TradingDay, ledger: Ledger | None) -> Metadata:
    metadata: Metadata = {
        "state": dg.MetadataValue.text(day.state.value),
        "messages": dg.MetadataValue.int(day.messages or 0),
        "gaps": dg.MetadataValue.int(len(day.gaps)),
        "by": dg.MetadataValue.text(day.actor),
        "command": dg.MetadataValue.text(f"ssmd day show {day.env} {day.date}"),
    }
    for name, at_ns in (("started", day.started_ns), ("ended", day.ended_ns)):
        if at_ns is not None:
            metadata[name] = dg.MetadataValue.timestamp(at_ns / 1e9)
    if day.condition_reasons:
        metadata["reasons"] = dg.MetadataValue.md("\n".join(f"- {text}" for text in day.condition_reasons))
    if ledger is not None and ledger.channels:
        metadata["ledger"] = ledger_table(ledger)
    if day.gaps:
        metadata["gap_table"] = gap_table(day.gaps)
    return metadata | _place(day.archive_url)


def ledger_table(ledger: Ledger) -> dg.TableMetadataValue:
    """Return the ledger as a table, one row per channel; a line that nobody drew up is empty."""
    columns = [dg.TableColumn("channel", "string"), *(dg.TableColumn(name, "int") for name in _LEDGER_COLUMNS)]
    records = [
        dg.TableRecord({"channel": sheet.channel, **{name: getattr(sheet, name) for name in _LEDGER_COLUMNS}})
        for sheet in ledger.channels
    ]
    return dg.MetadataValue.table(records=records, schema=dg.TableSchema(columns=columns))


def gap_table(gaps: Iterable[Gap]) -> dg.TableMetadataValue:
    """Return gaps as a table, the first `MOST_GAPS_SHOWN` of them."""
    records = [
        dg.TableRecord(
            {
                "gap": gap.gap_id,
                "cause": gap.cause,
                "from": _utc(gap.from_ns),
                "seconds": None if gap.to_ns is None else round((gap.to_ns - gap.from_ns) / 1e9, 3),
                "outcome": gap.outcome,
                "scope": " ".join(f"{name}={value}" for name, value in gap.scope.items())[:200],
            }
        )
        for gap in list(gaps)[:MOST_GAPS_SHOWN]
    ]
    columns = [
        dg.TableColumn(name, "float" if name == "seconds" else "string")
        for name in ("gap", "cause", "from", "seconds", "outcome", "scope")
    ]
    return dg.MetadataValue.table(records=records, schema=dg.TableSchema(columns=columns))


def _utc(at_ns: int) -> str:
    return datetime.fromtimestamp(at_ns // 1_000_000_000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _known(counts: dict[str, int | None]) -> Metadata:
    return {name: dg.MetadataValue.int(count) for name, count in counts.items() if count is not None}


def _size(holding: Holding | None) -> Metadata:
    if holding is None:
        return {}
    return {"size_bytes": dg.MetadataValue.int(holding.size), "objects": dg.MetadataValue.int(holding.objects)}


def _raw_sizes(held: Holdings) -> Metadata:
    if not held.raw:
        return {}
    records = [
        dg.TableRecord({"file": kind, "objects": holding.objects, "bytes": holding.size})
        for kind, holding in sorted(held.raw.items())
    ]
    columns = [dg.TableColumn("file", "string"), dg.TableColumn("objects", "int"), dg.TableColumn("bytes", "int")]
    total = Holding(
        objects=sum(holding.objects for holding in held.raw.values()),
        size=sum(holding.size for holding in held.raw.values()),
    )
    return {**_size(total), "files": dg.MetadataValue.table(records=records, schema=dg.TableSchema(columns=columns))}


def _place(url: str | None) -> Metadata:
    """Return where something lies: a link where a browser can follow it, else the path or address as text."""
    if not url:
        return {}
    if url.startswith(("http://", "https://")):
        return {"place": dg.MetadataValue.url(url)}
    return {"place": dg.MetadataValue.text(url) if "://" in url else dg.MetadataValue.path(url)}
