"""The numbers behind a day's pictures: messages over time, latency and markets, counted while the tables pass by.

What is kept is of one size whatever the day's. Not for drawing (`report`, `pictures`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ssmd_dagster.archive.tables import TABLE_OF_CHANNEL

TOP_MARKETS = 12
QUANTILES = (0.05, 0.5, 0.95, 0.99)
_NS = 1_000_000_000
_MAX_BINS = 1_440
_FINEST_NS, _COARSEST_NS, _PER_DECADE = 10_000.0, 1e13, 60
_EDGES = np.logspace(np.log10(_FINEST_NS), np.log10(_COARSEST_NS), 9 * _PER_DECADE + 1)

Told = Callable[[str], None]


class Claims(Protocol):
    """What a picture needs of a manifest (`day.seal.Manifest` or `recorded.Sealed`)."""

    @property
    def open_ns(self) -> int:
        """Return the window's beginning."""

    @property
    def close_ns(self) -> int:
        """Return the window's end."""


class Latency(NamedTuple):
    """How long after the exchange's time live records were received, in nanoseconds; within 4 %, `longest` exactly.

    `counted` are the records of whose lateness something can be said, `early` those received before the exchange's time: the
    two clocks differ by at least that.
    """

    quantiles_ns: tuple[float, ...]
    longest_ns: int
    counted: int
    early: int


class Figures(NamedTuple):
    """The numbers behind the pictures. `bins` are counts per channel, each of `bin_ns`, from the window's beginning on.

    Of one size whatever the day's. The normaliser keeps them beside the tables, without the coverage, which is a table.
    """

    bin_ns: int
    bins: dict[str, list[int]]
    latency: dict[str, Latency]
    markets: list[tuple[str, int]]
    market_count: int
    traded: dict[str, int]
    coverage: list[dict[str, Any]]

    @property
    def messages(self) -> dict[str, int]:
        """Return how many messages each channel has in the tables."""
        return {channel: sum(counts) for channel, counts in self.bins.items()}


class Counting:
    """Counts the rows of a day's tables as they are given, in any order and in pieces of any size."""

    def __init__(self, claims: Claims) -> None:
        self._open_ns, self._close_ns = claims.open_ns, claims.close_ns
        span_ns = max(claims.close_ns - claims.open_ns, 1)
        long = span_ns > 120 * 60 * _NS
        self._bin_ns = max(60 * _NS, -(-span_ns // _MAX_BINS)) if long else -(-span_ns // (120 * _NS)) * _NS
        self._bins: dict[str, npt.NDArray[np.int64]] = {}
        self._latency: dict[str, _LatencyCount] = {}
        self._markets: Counter[str] = Counter()
        self._traded: Counter[str] = Counter()

    def add(self, table: str, rows: pa.Table) -> None:
        """Count rows of a table of things that happened; of a book record with several levels the last row."""
        rows = rows.select(_columns(table))
        if table == "orderbook":
            rows = rows.filter(rows["last"])
        count = -(-max(self._close_ns - self._open_ns, 1) // self._bin_ns)
        bins = self._bins.setdefault(table, np.zeros(count, np.int64))
        latency = self._latency.setdefault(table, _LatencyCount())
        event_ns, recv_ns = rows["event_ns"].to_numpy(), rows["recv_ns"].to_numpy()
        inside = (event_ns >= self._open_ns) & (event_ns < self._close_ns)
        bins += np.bincount((event_ns[inside] - self._open_ns) // self._bin_ns, minlength=count)
        latency.add((recv_ns - event_ns)[_live(rows["source"])])
        for one in rows["ticker"].value_counts().to_pylist():
            self._markets[one["values"]] += one["counts"]
        if table == "trade":
            sums = rows.group_by("ticker").aggregate([("count", "sum")])
            for ticker, contracts in zip(sums["ticker"].to_pylist(), sums["count_sum"].to_pylist(), strict=True):
                self._traded[ticker] += contracts

    def found(self, coverage: Sequence[dict[str, Any]] = ()) -> Figures:
        """Return what was counted."""
        markets = sorted(self._markets.items(), key=lambda item: (-item[1], item[0]))[:TOP_MARKETS]
        counted = {channel: table for channel, table in TABLE_OF_CHANNEL.items() if table in self._bins}
        latency = {channel: self._latency[table].result() for channel, table in counted.items()}
        return Figures(
            bin_ns=self._bin_ns,
            bins={channel: self._bins[table].tolist() for channel, table in counted.items()},
            latency={channel: one for channel, one in latency.items() if one is not None},
            markets=markets,
            market_count=len(self._markets),
            traded={ticker: self._traded[ticker] for ticker, _ in markets},
            coverage=list(coverage),
        )


def figures(claims: Claims, tables: Mapping[str, Any], told: Told = lambda _table: None) -> Figures:
    """Count over a day's tables, a batch at a time.

    Args:
        claims: The day's manifest.
        tables: `pyarrow` tables or datasets by name; those that are not there are left out.
        told: Called with each table's name when it is done.
    """
    counting = Counting(claims)
    for table in TABLE_OF_CHANNEL.values():
        if table not in tables:
            continue
        rows = tables[table]
        counting.add(table, rows.schema.empty_table())
        for batch in [rows] if isinstance(rows, pa.Table) else rows.to_batches(columns=_columns(table)):
            counting.add(table, batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch]))
        told(table)
    coverage = tables.get("coverage")
    if coverage is None:
        return counting.found()
    return counting.found((coverage if isinstance(coverage, pa.Table) else coverage.to_table()).to_pylist())


def _columns(table: str) -> list[str]:
    own = {"orderbook": ["last"], "trade": ["count"]}
    return ["ticker", "event_ns", "recv_ns", "source", *own.get(table, [])]


def _live(source: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    words = source.unify_dictionaries().combine_chunks()
    names = words.dictionary.to_pylist()
    live: npt.NDArray[np.bool_] = words.indices.to_numpy() == (names.index("live") if "live" in names else -1)
    return live


class _LatencyCount:
    """A histogram of lateness on a logarithmic scale: exact enough for quantiles, of one size for any day."""

    def __init__(self) -> None:
        self._counts = np.zeros(len(_EDGES) + 1, np.int64)
        self._longest = 0
        self._early = 0

    def add(self, late_ns: npt.NDArray[np.int64]) -> None:
        late_ns = late_ns[late_ns != 0]  # no event time was given, so the receive time stands in for it
        if not len(late_ns):
            return
        self._early += int((late_ns < 0).sum())
        late_ns = late_ns[late_ns > 0]
        if len(late_ns):
            self._counts += np.bincount(np.searchsorted(_EDGES, late_ns), minlength=len(_EDGES) + 1)
            self._longest = max(self._longest, int(late_ns.max()))

    def result(self) -> Latency | None:
        counted = int(self._counts.sum())
        if not counted and not self._early:
            return None
        if not counted:
            return Latency((), 0, 0, self._early)
        reached = np.searchsorted(np.cumsum(self._counts), np.array(QUANTILES) * counted)
        values = np.minimum(_EDGES[np.minimum(reached, len(_EDGES) - 1)], self._longest)
        return Latency(tuple(values.tolist()), self._longest, counted, self._early)
