"""Rows of one table put aside on disk, so that a day larger than memory comes back market by market.

Rows arrive in the order of the raw files; they are written in runs sorted by ticker and given back as units of whole markets,
or of stretches of time of a market that is too large. What a row means is not looked at, but for its market and time.
"""

from __future__ import annotations

import bisect
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssmd_dagster.archive.filing import Integers, market_ranks

RUN_ROWS = 150_000
BATCH_ROWS = 4_096
"""Runs are read in such pieces; of each run a unit reads at most two in vain."""
UNIT_ROWS = 150_000
STRETCH_MARGIN_NS = 30_000_000_000
"""Stretches of time of a large market are read with so much of their neighbours: no rule looks farther."""


class Unit(NamedTuple):
    """Markets from `first` to `last`; with `from_ns` and `to_ns` one market's stretch of event time."""

    first: str
    last: str
    from_ns: int | None = None
    to_ns: int | None = None


class _Run:
    """One sorted file: `names` are its tickers, in order, and `offsets` where each begins, and the end.

    Its batches are read, not mapped, so that what was looked at does not stay in memory.
    """

    def __init__(self, path: Path, names: list[str], offsets: list[int]) -> None:
        self.names, self.offsets = names, offsets
        self._reader = pa.ipc.open_file(pa.OSFile(str(path)))
        self._lock = threading.Lock()

    def rows(self, low: int, high: int) -> Iterator[pa.Table]:
        """Yield the rows `[low, high)` in small tables."""
        for at in range(low // BATCH_ROWS, -(-high // BATCH_ROWS)):
            with self._lock:
                batch = self._reader.get_batch(at)
            start = at * BATCH_ROWS
            first = max(low - start, 0)
            yield pa.Table.from_batches([batch.slice(first, min(high - start, batch.num_rows) - first)])


class Spill:
    """The rows of one table. `add` until all are there, then `units` and `load`; files stay until the folder is removed."""

    def __init__(self, folder: Path, name: str, *, run_rows: int, unit_rows: int) -> None:
        self.rows = 0
        self._folder, self._name = folder, name
        self._run_rows, self._unit_rows = run_rows, unit_rows
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._runs: list[_Run] = []

    def add(self, table: pa.Table) -> None:
        """Take rows; all tables have one schema, with `ticker` as a dictionary."""
        if table.num_rows == 0:
            return
        self._waiting.append(table)
        self._waiting_rows += table.num_rows
        self.rows += table.num_rows
        if self._waiting_rows >= self._run_rows:
            self.flush()

    def flush(self) -> None:
        """Write what waits in memory as a run."""
        if not self._waiting:
            return
        table = pa.concat_tables(self._waiting).unify_dictionaries().combine_chunks()
        self._waiting, self._waiting_rows = [], 0
        ranks = market_ranks(table)
        kind = np.int16 if ranks.max() < 2**15 else np.int32  # 16 bits are sorted by radix
        order = np.argsort(ranks.astype(kind), kind="stable")
        table = table.take(pa.array(order)).combine_chunks()
        path = self._folder / f"{self._name}-{len(self._runs)}.arrow"
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=BATCH_ROWS)
        sorted_ranks = ranks[order]
        starts = np.flatnonzero(np.concatenate(([True], sorted_ranks[1:] != sorted_ranks[:-1])))
        names = table["ticker"].take(pa.array(starts)).to_pylist()
        self._runs.append(_Run(path, names, [*starts.tolist(), len(order)]))

    def units(self) -> Iterator[Unit]:
        """Yield all markets in the order of their tickers, as units of a bounded number of rows."""
        self.flush()
        rows_of: dict[str, int] = {}
        for run in self._runs:
            for name, low, high in zip(run.names, run.offsets, run.offsets[1:], strict=False):
                rows_of[name] = rows_of.get(name, 0) + high - low
        first, last, total = "", "", 0
        for name in sorted(rows_of):
            if total and total + rows_of[name] > self._unit_rows:
                yield Unit(first, last)
                total = 0
            if rows_of[name] > 2 * self._unit_rows:
                yield from self._stretches(name, rows_of[name])
                continue
            first, last = (first if total else name), name
            total += rows_of[name]
        if total:
            yield Unit(first, last)

    def _stretches(self, name: str, rows: int) -> Iterator[Unit]:
        sample = np.sort(np.concatenate([_times(part)[::100] for part in self._parts(name, name)]))
        parts = -(-rows // self._unit_rows)
        edges = [int(sample[len(sample) * part // parts]) for part in range(1, parts)]
        bounds = [None, *sorted(set(edges)), None]
        for low, high in itertools.pairwise(bounds):
            yield Unit(name, name, low, high)

    def _parts(self, first: str, last: str) -> Iterator[pa.Table]:
        for run in self._runs:
            low = run.offsets[bisect.bisect_left(run.names, first)]
            high = run.offsets[bisect.bisect_right(run.names, last)]
            yield from run.rows(low, high)

    def load(self, unit: Unit) -> pa.Table:
        """Return the rows of a unit, of a stretch with those of its margins."""
        parts = self._parts(unit.first, unit.last)
        if unit.from_ns is not None or unit.to_ns is not None:
            low = -(2**63) if unit.from_ns is None else unit.from_ns - STRETCH_MARGIN_NS
            high = 2**63 - 1 if unit.to_ns is None else unit.to_ns + STRETCH_MARGIN_NS
            parts = (part.filter(pa.array((at >= low) & (at < high))) for part in parts for at in [_times(part)])
        return pa.concat_tables(parts).unify_dictionaries().combine_chunks()


def _times(table: pa.Table) -> Integers:
    times: Integers = pc.coalesce(table["event_ns"], table["recv_ns"]).to_numpy()
    return times
