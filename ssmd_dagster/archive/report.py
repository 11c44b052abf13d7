"""A recorded day as one page for people: what was recorded when, what is missing, how late it came, and whether it adds up.

`pictures` draws what `figures` has counted, `page` writes one HTML file that needs neither network nor scripts. Not here: how
a chart is drawn (`pictures`), nor any judgement of the day (`day.condition`).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssmd_dagster.archive.drift import Drift
from ssmd_dagster.archive.figures import QUANTILES, Claims, Figures, Latency, figures
from ssmd_dagster.archive.pictures import Bar, Lane, Range, Stretch, bars, lanes, ranges, strip
from ssmd_dagster.archive.recorded import DayNotReadyError, Findings, Recorded, Sealed
from ssmd_dagster.archive.selection import Selection
from ssmd_dagster.archive.tables import SCHEMAS, TABLE_OF_CHANNEL
from ssmd_dagster.day.causes import NEVER_DEGRADE
from ssmd_dagster.day.events import Gap
from ssmd_dagster.day.ledger import ChannelLedger, Ledger

MAX_GAPS = 200
_NS = 1_000_000_000

Told = Callable[[str], None]


class _Noted(msgspec.Struct, frozen=True):
    figures: Figures | None = None


def pictures(claims: Claims, findings: bytes | None, coverage: bytes | None) -> dict[str, str]:
    """Return the day's pictures as SVG by name: `messages`, `coverage`, `latency`, `markets`.

    `findings` is the JSON that the normaliser left beside the tables, `coverage` the Parquet file. A picture about which neither
    says anything is left out. `archive.pictures.markdown` makes Markdown of them.
    """
    found = None if findings is None else msgspec.json.decode(findings, type=_Noted).figures
    if found is None:
        found = Figures(bin_ns=0, bins={}, latency={}, markets=[], market_count=0, traded={}, coverage=[])
    rows = [] if coverage is None else pq.read_table(io.BytesIO(coverage)).to_pylist()
    return drawn(claims, found._replace(coverage=rows))


def drawn(claims: Claims, found: Figures) -> dict[str, str]:
    """Draw the pictures of `figures`."""
    made: dict[str, str] = {}
    holes = [row for row in found.coverage if row["state"] == "missing" and row["market"] is None]
    if found.bins:
        made["messages"] = lanes(
            "Messages by channel over the day",
            claims.open_ns,
            claims.close_ns,
            [
                Lane(
                    TABLE_OF_CHANNEL[channel],
                    counts,
                    [_hole(row) for row in holes if row["channel"] == channel and not _is_closed(row)],
                    [_hole(row) for row in holes if row["channel"] == channel and _is_closed(row)],
                )
                for channel, counts in found.bins.items()
            ],
            _per(found.bin_ns),
        )
    if found.coverage:
        channels = list(dict.fromkeys(row["channel"] for row in found.coverage))
        made["coverage"] = strip(
            "Coverage by channel over the day",
            claims.open_ns,
            claims.close_ns,
            [
                (
                    TABLE_OF_CHANNEL.get(channel, channel),
                    [
                        Stretch(
                            row["from_ns"],
                            row["to_ns"],
                            "closed" if _is_closed(row) else row["state"],
                            _hole_words(row),
                        )
                        for row in found.coverage
                        if row["channel"] == channel
                    ],
                )
                for channel in channels
            ],
        )
    late = {channel: latency for channel, latency in found.latency.items() if latency.quantiles_ns}
    if late:
        made["latency"] = ranges(
            "Time from the exchange's event to its receipt",
            [
                Range(
                    TABLE_OF_CHANNEL[channel],
                    tuple(quantile / 1e6 for quantile in latency.quantiles_ns),
                    f"{TABLE_OF_CHANNEL[channel]}: {_latency_words(latency)}",
                )
                for channel, latency in late.items()
            ],
            "ms",
        )
    if found.markets:
        made["markets"] = bars(
            "Markets with the most messages",
            [
                Bar(ticker, count, f"{count:,} rows, {found.traded.get(ticker, 0) / 100:,.2f} contracts traded")
                for ticker, count in found.markets
            ],
        )
    return made


def report(recorded: Recorded, date: str, *, revision: int | None = None, told: Told = lambda _table: None) -> str:
    """Return a recorded day as one HTML page.

    Raises:
        DayNotFoundError: Nothing is recorded of the day.
        DayNotReadyError: It has no manifest yet.
        BrokenFileError: A table or the manifest is damaged.
    """
    sealed = recorded.sealed(date, revision)
    if sealed is None:
        if date not in recorded.dates():
            raise recorded.not_recorded(date)
        raise DayNotReadyError(
            f"{date} has no manifest yet: it is not ended, or only its tables are at hand",
            where=recorded.name,
            do=f"See `ssmd day show {recorded.name} {date}`",
        )
    selections = [
        Selection(recorded, table, (file,))
        for table in SCHEMAS
        if (file := recorded.file(date, table, sealed.revision)) is not None
    ]
    try:
        counted = figures(sealed, {one.table: one.dataset() for one in selections}, told)
    except (pa.ArrowException, OSError):
        for one in selections:
            one.read()  # raises with the name of the file that is damaged
        raise
    return page(sealed, counted, recorded.findings(date, sealed.revision))


def page(sealed: Sealed, found: Figures, noted: Findings) -> str:
    """Return the HTML of a day's report."""
    made = drawn(sealed, found)
    messages = sum(found.messages.values())
    gaps = [gap for gap in sealed.gaps if gap.cause not in NEVER_DEGRADE]
    worst = max((latency.quantiles_ns[-1] for latency in found.latency.values() if latency.quantiles_ns), default=None)
    tiles = [
        ("messages in the tables", f"{messages:,}"),
        ("markets", f"{found.market_count:,}"),
        ("trades", f"{found.messages.get('trade', 0):,}"),
        ("gaps", f"{len(gaps):,}"),
        ("p99 latency", "–" if worst is None else _milliseconds(worst)),
    ]
    title = f"{sealed.env} {sealed.date}"
    head = (
        f'<header><p class="crumb">{escape(sealed.env)} · trading day</p><h1>{escape(sealed.date)} '
        f'<span class="badge {sealed.condition}">{sealed.condition}</span></h1>'
        f"<p>{_instant(sealed.open_ns)} to {_instant(sealed.close_ns)} UTC · revision {sealed.revision}</p>"
        f"{_list(sealed.condition_reasons)}</header>"
    )
    boxes = "".join(f"<div><b>{value}</b><span>{name}</span></div>" for name, value in tiles)
    body = [head, f'<div class="tiles">{boxes}</div>']
    bin_words = _per(found.bin_ns)
    for name, heading, words in (
        (
            "messages",
            "Messages",
            (
                f"Messages {bin_words} by the exchange's time, each channel on its own scale. Red: nothing was recorded; "
                "grey: the exchange was closed."
            ),
        ),
        (
            "coverage",
            "Coverage",
            "What is there of each channel, all markets and single ones; the table of gaps says why not.",
        ),
        ("latency", "Latency", "From the exchange's event to its receipt: median, thick to p95, thin to p99."),
        ("markets", "Top markets", "The most rows over all channels."),
    ):
        if name in made:
            body.append(f"<section><h2>{heading}</h2><p>{words}</p><figure>{made[name]}</figure></section>")
        if name == "coverage":
            body.append(f"<section><h2>Gaps</h2>{_gaps(sealed.gaps)}</section>")
        if name == "latency" and found.latency:
            body.append(_latencies(found.latency))
    body.append(f"<section><h2>Ledger</h2>{_ledger(sealed.ledger)}</section>")
    if noted.damaged:
        body.append(f"<section><h2>Damaged</h2><p>Batches that could not be read.</p>{_list(noted.damaged)}</section>")
    body.append(f"<section><h2>Drift</h2>{_drift(noted.drift)}</section>")
    body.append(
        f"<footer>Root hash of the segments <code>{escape(sealed.root_hash or '–')}</code> · made by "
        f"{escape(', '.join(f'{name} {version}' for name, version in sorted(sealed.versions.items())) or '–')} · "
        f"sealed {escape(sealed.created_at or '–')}</footer>"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
        f'initial-scale=1"><title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{"".join(body)}</main>'
        "</body></html>\n"
    )


def _gaps(gaps: Sequence[Gap]) -> str:
    if not gaps:
        return "<p>None.</p>"
    rows = [
        (
            _instant(gap.from_ns),
            "still open" if gap.to_ns is None else _instant(gap.to_ns),
            "–" if gap.to_ns is None else _seconds(gap.to_ns - gap.from_ns),
            gap.cause,
            gap.outcome + (f", {gap.detail}" if gap.detail else ""),
            ", ".join(f"{key} {_scope(value)}" for key, value in gap.scope.items()) or "everything",
        )
        for gap in gaps[:MAX_GAPS]
    ]
    more = f"<p>{len(gaps) - MAX_GAPS:,} more; see <code>ssmd data gaps</code>.</p>" if len(gaps) > MAX_GAPS else ""
    return _table(("From (UTC)", "To", "Lasted", "Cause", "Outcome", "Scope"), rows) + more


def _scope(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:5])) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    return str(value)


def _latencies(latency: Mapping[str, Latency]) -> str:
    rows = [
        (
            TABLE_OF_CHANNEL[channel],
            *([_milliseconds(quantile) for quantile in one.quantiles_ns] or ["–"] * len(QUANTILES)),
            _milliseconds(one.longest_ns) if one.counted else "–",
            f"{one.counted:,}",
            f"{one.early:,}",
        )
        for channel, one in latency.items()
    ]
    return _table(
        ("", "p5", "median", "p95", "p99", "longest", "records", "before their event time"), rows, numbers=True
    )


def _ledger(plain: dict[str, Any] | None) -> str:
    if plain is None:
        return "<p>None was drawn up: the day was not verified.</p>"
    ledger = Ledger.from_json(plain)
    lines = [line.name for line in ChannelLedger(channel="").lines()]
    rows = [(sheet.channel, *(_count(line.size) for line in sheet.lines())) for sheet in ledger.channels]
    told = [_table(("Channel", *lines), rows, numbers=True)] if rows else []
    beside = [
        (line.name, _count(line.size))
        for line in ledger.lines()
        if line.name.split(" ")[0] in ("wire", "trades", "books")
    ]
    told.append(_table(("Beside it", "Count"), beside, numbers=True))
    differences = [
        (
            one.name,
            f"{one.size:+,}",
            f"explained by {', '.join(one.explained_by)}" if one.explained else "UNEXPLAINED",
        )
        for one in ledger.differences()
    ]
    told.append(
        _table(("Difference", "Size", ""), differences)
        if differences
        else "<p>No difference between any two sides that were computed.</p>"
    )
    rejected = [
        (sheet.channel, reason, f"{count:,}")
        for sheet in ledger.channels
        for reason, count in sorted((sheet.rejected or {}).items())
        if count
    ]
    if rejected:
        told.append(_table(("Rejected of", "Reason", "Records"), rejected))
    if missing := ledger.not_computed_briefly():
        told.append(f"<p>Not computed: {escape(', '.join(missing))}.</p>")
    return "".join(told)


def _drift(drift: Sequence[Drift]) -> str:
    if not drift:
        return "<p>Nothing was sent that the reader does not know.</p>"
    rows = [(one.kind, f"{one.name} {one.json_type}".rstrip(), f"{one.count:,}", one.example) for one in drift]
    told = _table(("", "What", "Times", "First example"), rows, code=3)
    return f"<p>Unknown keys, types and shapes: kept in raw, and read where they can be.</p>{told}"


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False, code: int | None = None
) -> str:
    def cell(index: int, text: str) -> str:
        shown = f"<code>{escape(text)}</code>" if index == code else escape(text)
        return f"<td>{shown}</td>"

    lines = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    heads = "".join(f"<th>{escape(text)}</th>" for text in head)
    return f'<div class="wide"><table{" class=n" if numbers else ""}><tr>{heads}</tr>{lines}</table></div>'


def _list(reasons: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(reason)}</li>' for reason in reasons)}</ul>" if reasons else ""


def _is_closed(row: Mapping[str, Any]) -> bool:
    """Say whether nothing is there because there was nothing to record."""
    return row["state"] == "missing" and row["cause"] in NEVER_DEGRADE


def _hole(row: Mapping[str, Any]) -> tuple[int, int, str]:
    return row["from_ns"], row["to_ns"], _hole_words(row)


def _hole_words(row: Mapping[str, Any]) -> str:
    cause = f" ({row['cause']})" if row["cause"] else ""
    market = f", {row['market']}" if row["market"] else ""
    return f"{row['state']}{cause}{market}: {_instant(row['from_ns'])} to {_instant(row['to_ns'])}"


def _latency_words(latency: Latency) -> str:
    names = ("p5", "median", "p95", "p99")
    told = ", ".join(f"{name} {_milliseconds(value)}" for name, value in zip(names, latency.quantiles_ns, strict=True))
    return f"{told}, longest {_milliseconds(latency.longest_ns)}"


def _count(count: int | None) -> str:
    return "not computed" if count is None else f"{count:,}"


def _instant(at_ns: int) -> str:
    return str(np.datetime64(at_ns, "ns").astype("datetime64[ms]")).replace("T", " ")


def _per(bin_ns: int) -> str:
    return "a minute" if bin_ns == 60 * _NS else f"per {_seconds(bin_ns)}"


def _seconds(span_ns: int) -> str:
    return f"{span_ns / _NS:,.3f}".rstrip("0").rstrip(".") + " s"


def _milliseconds(span_ns: float) -> str:
    return f"{span_ns / 1e6:,.{1 if span_ns >= 1e7 else 2}f} ms" if span_ns < 1e9 else f"{span_ns / 1e9:,.1f} s"


_STYLE = """
:root{color-scheme:light dark;--s:#fff;--i:#1f2328;--m:#59636e;--g:#d9dee4;--p:#f5f7f9;--ok:#1a7f4b;--warn:#9a6700;--bad:#c8281e}
@media(prefers-color-scheme:dark){:root{--s:#15191f;--i:#e8ebef;--m:#9aa5b1;--g:#343b45;--p:#1d232b;--ok:#4cc38a;--warn:#f0c04b;
--bad:#ff6b5e}}
*{box-sizing:border-box}body{margin:0;background:var(--s);color:var(--i);font:15px/1.5 system-ui,sans-serif}
main{max-width:1024px;margin:0 auto;padding:32px 24px 64px}h1{font-size:30px;margin:0;display:flex;gap:14px;align-items:center}
h2{font-size:19px;margin:0}header p,section>p,footer,.crumb{color:var(--m);margin:2px 0 8px}section{margin-top:38px}
.badge{font-size:14px;font-weight:600;padding:2px 12px;border-radius:99px;border:1.5px solid currentColor}
.available{color:var(--ok)}.degraded,.pending{color:var(--warn)}.missing{color:var(--bad)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin-top:22px}
.tiles div{background:var(--p);border-radius:10px;padding:12px 16px}.tiles b{display:block;font-size:23px}
.tiles span{color:var(--m);font-size:13px}figure{margin:0;overflow-x:auto}
figure svg{width:100%;min-width:760px;height:auto;display:block}
.wide{overflow-x:auto;margin:8px 0}
table{border-collapse:collapse;min-width:50%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{text-align:left;color:var(--m);font-weight:500}
th,td{padding:5px 14px 5px 0;border-bottom:1px solid var(--g);vertical-align:top;white-space:nowrap}
table:not(.n) td:last-child{white-space:normal;min-width:14em}
.n td:not(:first-child),.n th:not(:first-child){text-align:right;padding:5px 0 5px 14px}
code{font:12.5px ui-monospace,monospace;overflow-wrap:anywhere}
footer{margin-top:48px;border-top:1px solid var(--g);padding-top:12px;font-size:13px;overflow-wrap:anywhere}
@media print{main{max-width:none;padding:0}section{break-inside:avoid}}
"""
