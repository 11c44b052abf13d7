"""A day's raw segments as tables: everything that was archived becomes a row of exactly one day, or is counted under why not.

Synchronous, over local files, within bounded memory whatever the size of the day; the same input gives the same bytes. It
runs as a process of its own, so that it can be killed: `python -m ssmd_dagster.archive.normalize JOB RESULT`. Not here:
fetching and storing (`workflows.normalize`), what a message means (the exchange's room), which copy of a thing is kept
(`filing`).
"""

from __future__ import annotations

import mmap
import re
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pyarrow as pa

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, BatchHeader, Damage, decode_records, scan
from ssmd_dagster.archive.columns import BlockRows, read_block
from ssmd_dagster.archive.coverage import Life, coverage_rows
from ssmd_dagster.archive.drift import Drift, DriftLog
from ssmd_dagster.archive.figures import Counting, Figures
from ssmd_dagster.archive.filing import (
    DUPLICATE,
    FIRST,
    NEIGHBOUR_FIRST,
    NEIGHBOUR_SECOND,
    NORMALISED,
    OPENING_FOLD,
    OTHER_DAY,
    REST,
    SAME_NS,
    SECOND,
    Connections,
    Filed,
    Spans,
    file_changes,
    file_lifecycle,
    file_trades,
    holes,
    integers,
    spans,
)
from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.archive.sheets import CapnpWriter, TableWriter
from ssmd_dagster.archive.spill import RUN_ROWS, UNIT_ROWS, Spill, Unit
from ssmd_dagster.archive.tables import SCHEMAS, TABLE_OF_CHANNEL, day_schema, table_from_rows
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Gap
from ssmd_dagster.exchange import REST as REST_CHANNEL
from ssmd_dagster.exchange import SESSION, Market, Row, row_reader

THREADS = 2
BLOCK_BYTES = 4 << 20
OVERLAP_NS = 60_000_000_000
"""How far from the day's edges the neighbouring days' batches are looked into."""
HOLE_MARGIN_NS = 10_000_000_000
"""So long before and after a hole of the first connection its second one's rows are compared."""
_FOREIGN = (NEIGHBOUR_FIRST, NEIGHBOUR_SECOND)
_CONN = re.compile(r"(?P<epoch>[0-9]+)-(?P<replica>[a-z]+)(?P<slice>[0-9]*)-(?P<number>[0-9]+)")


class RawSegment(msgspec.Struct, frozen=True, kw_only=True):
    """One local file of batches: a segment, or (`channel` empty) a spool with batches of all channels."""

    channel: str
    path: str


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """The day before or after: its window, its segments that may overlap, and when its revisions were sealed.

    `late_until_ns` is set where it is known to have received rows of the day long after: until when it did. `recorded_on`
    says of the day before that nothing else was recorded of this day at first: its roll was late, or the day was missed. Its
    connections that were still up count as the day's own then. `gaps` are that day's.
    """

    date: str
    open_ns: int
    close_ns: int
    segments: tuple[RawSegment, ...] = ()
    seals: tuple[int, ...] = ()
    late_until_ns: int | None = None
    recorded_on: bool = False
    gaps: tuple[Gap, ...] = ()


class NormalizeJob(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the tables of a day are made of. `seals`: when the day's revisions were sealed.

    `channels` are those that the day was to record, `markets` the security master as it is known, `source` what is said of
    rows off the socket (`archive` where an archive is replayed), `capnp_schema` the file of the trades' schema if Cap'n Proto
    files are wanted. Tables are written into the folder `output`, which is made.
    """

    feed: str
    env: str
    date: str
    open_ns: int
    close_ns: int
    output: str
    segments: tuple[RawSegment, ...]
    revision: int = 1
    neighbours: tuple[Neighbour, ...] = ()
    gaps: tuple[Gap, ...] = ()
    channels: tuple[str, ...] = ()
    markets: tuple[Market, ...] = ()
    seals: tuple[int, ...] = ()
    source: str = "live"
    capnp_schema: str | None = None


class TableFile(msgspec.Struct, frozen=True, kw_only=True):
    """One written file; `ticker` is set for the Cap'n Proto file of one market."""

    table: str
    path: str
    rows: int
    size: int
    sha256: str
    ticker: str | None = None


class ChannelFiling(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a channel's archived records; the lines add up to `archived`. `rejected` is by reason."""

    archived: int = 0
    normalised: int = 0
    duplicates: int = 0
    control: int = 0
    rejected: dict[str, int] = {}
    other_day: int = 0
    opening_fold: int = 0

    @property
    def balances(self) -> bool:
        """Say whether every record is accounted for."""
        filed = self.normalised + self.duplicates + self.control + self.other_day + self.opening_fold
        return self.archived == filed + sum(self.rejected.values())


class LateElsewhere(msgspec.Struct, frozen=True):
    """Rows of a neighbouring day that came after its seal; `until_ns`: when the last of them was received."""

    rows: int
    until_ns: int


class NormalizeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The tables of a day and the account of its records.

    `filings` are by raw channel, of the day's own records; `from_neighbours` counts rows by table that only the neighbouring
    days' raw files have. `damaged` names batches that could not be read (their records count as not archived). `late` counts
    rows off a socket that came after a seal of the day, `late_elsewhere` per neighbouring date those of its rows that came
    after its own. `figures` are what the day's pictures are drawn from, without the coverage, which is a table.
    """

    files: tuple[TableFile, ...]
    filings: dict[str, ChannelFiling]
    from_neighbours: dict[str, int]
    drift: tuple[Drift, ...]
    damaged: tuple[str, ...]
    late: int
    late_elsewhere: dict[str, LateElsewhere]
    figures: Figures | None = None


class _Conn(NamedTuple):
    """A connection by its id; `neighbour` is None for the day's own. The rank says whether it is filed as one of those."""

    name: str
    code: int
    rank: int
    neighbour: int | None


class _Block(NamedTuple):
    """Batches of one connection and channel that are read together."""

    channel: str
    conn: _Conn
    data: memoryview
    batches: tuple[Batch, ...]
    key: str


class _Scanned(NamedTuple):
    segment: RawSegment
    neighbour: int | None
    batches: tuple[Batch, ...]


class _FiledUnit(NamedTuple):
    """What was filed together: all its rows, the answer, and the rows of the table."""

    unit: Unit
    rows: pa.Table
    filed: Filed
    table: pa.Table


def normalize_day(job: NormalizeJob, *, run_rows: int = RUN_ROWS, unit_rows: int = UNIT_ROWS) -> NormalizeResult:
    """Make the tables of a day. Memory: some hundred MiB; disk: about 120 bytes a row beside the tables.

    `run_rows` and `unit_rows` bound what is in memory at a time; the tables do not depend on them.

    Raises:
        OSError: A segment is missing, or the disk is full.
    """
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="spill-", dir=output) as folder:
        spills = {
            name: Spill(Path(folder), name, run_rows=run_rows, unit_rows=unit_rows)
            for name in TABLE_OF_CHANNEL.values()
        }
        return _Normalizer(job, output, spills).run()


class _Normalizer:
    """One run; see `normalize_day`."""

    def __init__(self, job: NormalizeJob, output: Path, spills: Mapping[str, Spill]) -> None:
        self._job, self._output = job, output
        self._window = Window(open_ns=job.open_ns, close_ns=job.close_ns)
        self._reader = row_reader(job.feed)
        self._spills = spills
        self._drift = DriftLog()
        self._counting = Counting(job)
        self._damaged: list[str] = []
        self._files: list[TableFile] = []
        self._archived: Counter[str] = Counter()
        self._control: Counter[str] = Counter()
        self._rejected: dict[str, Counter[str]] = {}
        self._outcomes: dict[str, Counter[int]] = {}
        self._rejected_pages: set[tuple[int, int]] = set()
        self._pages: dict[int, set[tuple[int, int]]] = {NORMALISED: set(), DUPLICATE: set(), OTHER_DAY: set()}
        self._from_neighbours: Counter[str] = Counter()
        self._late: list[Row] = []
        self._late_elsewhere: dict[str, LateElsewhere] = {}
        self._markets: dict[str, Row] = {}
        self._rest_spans: dict[str, tuple[int, int]] = {}

    def run(self) -> NormalizeResult:
        """Do it all."""
        scanned = self._scan()
        self._conns = _connections(self._job, scanned)
        self._by_code = sorted(self._conns.values(), key=lambda conn: conn.code)
        self._lives = _lives(self._job, scanned, self._conns)
        self._earlier = _earlier_lives(self._job, scanned, self._conns)
        self._know_connections()
        self._read_all(scanned)
        self._know_markets()
        names = tuple(self._spills)
        with ThreadPoolExecutor(THREADS) as pool:
            filing = self._in_turn(pool, names)
            for name in names:
                self._write(name, filing)
        self._write_small("coverage", [row._asdict() for row in self._coverage()])
        self._write_small("security_master", [self._markets[ticker] for ticker in sorted(self._markets)])
        self._late.sort(
            key=lambda row: (row["table"], row["ticker"], row["event_ns"], row["conn"], row["n"], row["row"])
        )
        self._write_small("late", self._late)
        return NormalizeResult(
            files=tuple(self._files),
            filings=self._filings(),
            from_neighbours=dict(sorted(self._from_neighbours.items())),
            drift=self._drift.found(),
            damaged=tuple(self._damaged),
            late=len(self._late),
            late_elsewhere=dict(sorted(self._late_elsewhere.items())),
            figures=self._counting.found(),
        )

    # Raw files → rows on disk.

    def _scan(self) -> list[_Scanned]:
        """Read the headers of all batches; of the neighbours' only those near the day's edges are kept."""
        found = []
        for neighbour, segments in (
            (None, self._job.segments),
            *((i, n.segments) for i, n in enumerate(self._job.neighbours)),
        ):
            for segment in segments:
                data = _mapped(Path(segment.path))
                batches = []
                for item in scan(data):
                    if isinstance(item, Damage) and neighbour is None:
                        self._damaged.append(
                            f"{Path(segment.path).name}: bytes {item.start}-{item.end} belong to no whole batch"
                        )
                    elif isinstance(item, Batch) and (neighbour is None or self._overlaps(item, neighbour)):
                        batches.append(item)
                found.append(_Scanned(segment, neighbour, tuple(batches)))
        return found

    def _overlaps(self, batch: Batch, neighbour: int) -> bool:
        low, high = self._job.open_ns - OVERLAP_NS, self._job.close_ns + OVERLAP_NS
        if self._job.neighbours[neighbour].recorded_on:
            low = 0  # what made the books that the day opens with
        high = max(high, self._job.neighbours[neighbour].late_until_ns or high)
        return batch.header.recv_last_ns >= low and batch.header.recv_first_ns <= high

    def _know_connections(self) -> None:
        order = sorted(self._by_code, key=lambda conn: (conn.rank in _FOREIGN, conn.neighbour or 0, _age(conn.name)))
        place = np.zeros(len(order), np.int64)
        place[[conn.code for conn in order]] = np.arange(len(order))
        filling = {conn.code: self._holes_of_first(conn) for conn in order if conn.rank == SECOND}
        self._known = Connections(np.array([conn.rank for conn in self._by_code], np.int64), place, filling)

    def _holes_of_first(self, second: _Conn) -> Spans:
        """Return when the first connections of a second one's shard recorded nothing or had a gap.

        Connections of one replica that overlap were not meant to: all that the later one has is compared.
        """
        part = _slice(second.name)
        firsts = {conn.name for conn in self._by_code if conn.rank == FIRST and _slice(conn.name) == part}
        if any(_replica(name) == _replica(second.name) for name in firsts):
            return spans(holes(()))
        intervals = holes((life.from_ns, life.to_ns) for life in self._lives if life.conn in firsts)
        for gap in self._job.gaps:
            conn = gap.scope.get("conn")
            component = str(gap.scope.get("component", ""))
            if conn in firsts or (conn is None and component in ("", f"connector-a{part}")):
                intervals.append((gap.from_ns, self._job.close_ns if gap.to_ns is None else gap.to_ns))
        return spans(intervals)

    def _blocks(self, scanned: list[_Scanned]) -> Iterator[_Block]:
        for part in scanned:
            data = _mapped(Path(part.segment.path))  # one at a time: what is mapped counts as memory
            group: list[Batch] = []
            size = 0
            for batch in part.batches:
                if group and (_stream(batch) != _stream(group[0]) or size + batch.header.bytes > BLOCK_BYTES):
                    yield self._block(part, data, group)
                    group, size = [], 0
                if part.neighbour is None or batch.header.channel in TABLE_OF_CHANNEL:
                    group.append(batch)
                    size += batch.header.bytes
            if group:
                yield self._block(part, data, group)

    def _block(self, part: _Scanned, data: memoryview, group: list[Batch]) -> _Block:
        conn, channel = _stream(group[0])
        return _Block(channel, self._conns[conn], data, tuple(group), Path(part.segment.path).name)

    def _read_all(self, scanned: list[_Scanned]) -> None:
        waiting: deque[tuple[_Block, Future[tuple[BlockRows, list[str]]]]] = deque()
        with ThreadPoolExecutor(THREADS) as pool:
            for block in self._blocks(scanned):
                waiting.append((block, pool.submit(self._read, block)))
                if len(waiting) > 2 * THREADS:
                    self._take(*waiting.popleft())
            while waiting:
                self._take(*waiting.popleft())

    def _read(self, block: _Block) -> tuple[BlockRows, list[str]]:
        parts: list[bytes] = []
        damaged: list[str] = []
        for batch in block.batches:
            try:
                parts.append(decode_records(block.data, batch))
            except BatchDamagedError as error:
                damaged.append(f"{block.key}: {error.what}")
        return read_block(self._reader, block.channel, b"".join(parts)), damaged

    def _take(self, block: _Block, future: Future[tuple[BlockRows, list[str]]]) -> None:
        rows, damaged = future.result()
        own = block.conn.neighbour is None
        if own:
            self._damaged += damaged
            self._archived[block.channel] += rows.records
            self._control[block.channel] += rows.control
            self._rejected.setdefault(block.channel, Counter()).update(rows.rejected)
            self._rejected_pages |= {(block.conn.code, n) for n in rows.rejected_pages}
            self._drift.merge(rows.drift)
            self._note_markets(rows.markets)
        for name, table in rows.tables.items():
            kept = self._wanted(name, table, block.conn)
            codes = pa.array(np.full(kept.num_rows, block.conn.code, np.int32))
            self._spills[name].add(kept.append_column("conn", codes))
        if block.channel == REST_CHANNEL and "trade" in rows.tables:
            at_ns = integers(rows.tables["trade"]["event_ns"])
            low, high = self._rest_spans.get(block.conn.name, (2**62, -(2**62)))
            self._rest_spans[block.conn.name] = (min(low, int(at_ns.min())), max(high, int(at_ns.max()) + 1))

    def _wanted(self, name: str, table: pa.Table, conn: _Conn) -> pa.Table:
        """Leave out early what a second or a neighbour's connection adds nothing with."""
        if name == "trade" and conn.rank not in _FOREIGN:
            return table
        recv_ns = integers(table["recv_ns"])
        if conn.rank not in _FOREIGN:
            if conn.rank != SECOND:
                return table
            keep = self._known.filling[conn.code].hold(recv_ns, HOLE_MARGIN_NS)
            first = _first_of_record(name, table)
            self._outcomes.setdefault(name, Counter())[DUPLICATE] += int((first & ~keep).sum())
            return table.filter(pa.array(keep))
        if name == "lifecycle":
            margin = SAME_NS if conn.rank == NEIGHBOUR_FIRST else -(2**62)
            keep = (recv_ns >= self._job.open_ns - margin) & (recv_ns < self._job.close_ns + margin)
            return table.filter(pa.array(keep))
        stated_ns = integers(table["event_ns"])
        return table.filter(pa.array((stated_ns >= self._job.open_ns) & (stated_ns < self._job.close_ns)))

    # Rows on disk → tables.

    def _in_turn(self, pool: ThreadPoolExecutor, names: Sequence[str]) -> Iterator[_FiledUnit | None]:
        """Yield the filed units of all tables and None behind each table's last; some are filed ahead, of the next table too."""
        waiting: deque[Future[_FiledUnit] | None] = deque()
        for name in names:
            for unit in self._spills[name].units():
                waiting.append(pool.submit(self._file, name, self._spills[name], unit))
                while sum(future is not None for future in waiting) >= THREADS:
                    yield _result(waiting.popleft())
            waiting.append(None)
        while waiting:
            yield _result(waiting.popleft())

    def _write(self, name: str, filing: Iterator[_FiledUnit | None]) -> None:
        job = self._job
        path = self._output / f"{name}.parquet"
        self._counting.add(name, SCHEMAS[name].empty_table())  # a table without rows is one of the day's too
        capnp = CapnpWriter(Path(job.capnp_schema), self._output) if job.capnp_schema and name == "trade" else None
        with TableWriter(path, self._schema(name)) as writer:
            for done in iter(filing.__next__, None):
                unit, rows, filed, table = done
                self._account(name, unit, rows, filed)
                self._counting.add(name, table)
                writer.write(table)
                if capnp is not None:
                    self._files += [TableFile(table="trade", **file) for file in capnp.write(table)]
                if name == "lifecycle":
                    self._note_lifecycle(table)
        self._files.append(
            TableFile(table=name, path=str(path), rows=writer.rows, size=writer.size, sha256=writer.sha256)
        )

    def _schema(self, name: str) -> pa.Schema:
        job = self._job
        return day_schema(
            name, env=job.env, date=job.date, revision=job.revision, open_ns=job.open_ns, close_ns=job.close_ns
        )

    def _file(self, name: str, spill: Spill, unit: Unit) -> _FiledUnit:
        rows = spill.load(unit)
        if name == "trade":
            filed = file_trades(rows, self._known, self._window)
        elif name == "lifecycle":
            filed = file_lifecycle(rows, self._known, self._window)
        else:
            filed = file_changes(name, rows, self._known, self._window)
        order = filed.order
        if unit.from_ns is not None or unit.to_ns is not None:
            order = order[_core(unit, filed.event_ns[order])]
        return _FiledUnit(unit, rows, filed, self._table(name, rows, filed, order, fold=unit.from_ns is None))

    def _table(self, name: str, rows: pa.Table, filed: Filed, order: Any, *, fold: bool) -> pa.Table:
        schema = SCHEMAS[name]
        taken = rows.take(pa.array(order))
        codes = integers(taken["conn"])
        names = pa.array([conn.name for conn in self._by_code])
        source = np.where(self._known.rank[codes] == REST, 1, 0).astype(np.int32)
        made = {
            "event_ns": pa.array(filed.event_ns[order]),
            "conn": pa.DictionaryArray.from_arrays(pa.array(codes.astype(np.int32)), names),
            "source": pa.DictionaryArray.from_arrays(pa.array(source), pa.array([self._job.source, "rest"])),
        }
        arrays = [made[field.name] if field.name in made else taken[field.name] for field in schema]
        table = pa.Table.from_arrays(
            [_typed(array, field.type) for array, field in zip(arrays, schema, strict=True)], schema=schema
        )
        if not filed.folded or not fold:
            return table
        opening = [row | {"conn": self._by_code[row["conn"]].name, "source": "opening_fold"} for row in filed.folded]
        both = pa.concat_tables([table_from_rows(name, opening), table])
        places = {ticker: place for place, ticker in enumerate(sorted(both["ticker"].unique().to_pylist()))}
        encoded = both["ticker"].combine_chunks().dictionary_encode()
        ranks = np.array([places[ticker] for ticker in encoded.dictionary.to_pylist()])[encoded.indices.to_numpy()]
        return both.take(pa.array(np.argsort(ranks, kind="stable")))

    def _account(self, name: str, unit: Unit, rows: pa.Table, filed: Filed) -> None:
        codes = integers(rows["conn"])
        ranks = self._known.rank[codes]
        core = _core(unit, filed.event_ns)
        foreign = np.array([conn.neighbour is not None for conn in self._by_code], np.bool_)[codes]
        own = core & ((ranks <= SECOND) & ~foreign & _first_of_record(name, rows))
        self._outcomes.setdefault(name, Counter()).update(
            dict(enumerate(np.bincount(filed.outcome[own], minlength=OPENING_FOLD + 1).tolist()))
        )
        self._from_neighbours[name] += int((core & foreign & (filed.outcome == NORMALISED)).sum())
        if (ranks == REST).any():
            n = integers(rows["n"])
            for outcome, pages in self._pages.items():
                at = np.flatnonzero(core & (ranks == REST) & (filed.outcome == outcome))
                pages.update(zip(codes[at].tolist(), n[at].tolist(), strict=True))
        recv_ns = integers(rows["recv_ns"])
        if self._job.seals:
            late = core & (ranks != REST) & (filed.outcome == NORMALISED)
            at = np.flatnonzero(late & _sealed_between(filed.event_ns, recv_ns, self._job.seals))
            self._note_late(name, self._table(name, rows, filed, at, fold=False))
        for neighbour in self._job.neighbours:
            theirs = (filed.event_ns >= neighbour.open_ns) & (filed.event_ns < neighbour.close_ns)
            late = own & theirs & ((filed.outcome == OTHER_DAY) | (filed.outcome == OPENING_FOLD))
            late &= _sealed_between(filed.event_ns, recv_ns, neighbour.seals)
            if late.any():
                before = self._late_elsewhere.get(neighbour.date, LateElsewhere(0, 0))
                until_ns = max(before.until_ns, int(recv_ns[late].max()))
                self._late_elsewhere[neighbour.date] = LateElsewhere(before.rows + int(late.sum()), until_ns)

    def _note_late(self, name: str, table: pa.Table) -> None:
        for row in table.to_pylist():
            self._late.append(row | {"table": name, "row": msgspec.json.encode(row).decode()})

    def _filings(self) -> dict[str, ChannelFiling]:
        filings = {}
        for channel in sorted(self._archived):
            rejected = dict(sorted(self._rejected[channel].items()))
            outcomes = self._outcomes.get(TABLE_OF_CHANNEL.get(channel, ""), Counter())
            if channel == REST_CHANNEL:
                outcomes = self._page_outcomes(
                    self._archived[channel] - self._control[channel] - sum(rejected.values())
                )
            filings[channel] = ChannelFiling(
                archived=self._archived[channel],
                normalised=outcomes[NORMALISED],
                duplicates=outcomes[DUPLICATE],
                control=self._control[channel],
                rejected=rejected,
                other_day=outcomes[OTHER_DAY],
                opening_fold=outcomes[OPENING_FOLD],
            )
        return filings

    def _page_outcomes(self, pages: int) -> Counter[int]:
        """A page counts as normalised if any row of it is, else as duplicates if any is one, else as another day's."""
        kept = self._pages[NORMALISED] - self._rejected_pages
        repeated = self._pages[DUPLICATE] - self._rejected_pages - kept
        elsewhere = self._pages[OTHER_DAY] - self._rejected_pages - kept - repeated
        # what gave no rows of trades were pages of markets
        listed = pages - len(kept) - len(repeated) - len(elsewhere)
        return Counter({NORMALISED: len(kept) + listed, DUPLICATE: len(repeated), OTHER_DAY: len(elsewhere)})

    # What is not a stream of rows.

    def _write_small(self, name: str, rows: list[Row]) -> None:
        path = self._output / f"{name}.parquet"
        with TableWriter(path, self._schema(name)) as writer:
            writer.write(table_from_rows(name, rows))
        self._files.append(
            TableFile(table=name, path=str(path), rows=writer.rows, size=writer.size, sha256=writer.sha256)
        )

    def _coverage(self) -> list[Any]:
        fetched = [Life(conn, ("trade",), low, high) for conn, (low, high) in sorted(self._rest_spans.items())]
        if not self._lives:  # a replay, which is archived once it has all of the day's trades
            fetched = [life._replace(from_ns=self._job.open_ns, to_ns=self._job.close_ns) for life in fetched]
        channels = self._job.channels or tuple(sorted(set(self._archived) & set(TABLE_OF_CHANNEL)))
        earlier = [Life(conn, channels, *life) for conn, life in sorted(self._earlier.items())]
        theirs = [
            gap for day in self._job.neighbours for gap in day.gaps if str(gap.scope.get("conn")) in self._earlier
        ]
        return coverage_rows(self._window, [*self._lives, *earlier, *fetched], [*self._job.gaps, *theirs], channels)

    def _know_markets(self) -> None:
        for market in self._job.markets:
            row = msgspec.to_builtins(market)
            detail = msgspec.json.encode(market.detail, order="sorted").decode() if market.detail else None
            before = self._markets.get(market.ticker, {})
            self._markets[market.ticker] = before | row | {"detail": detail, "source": "secmaster"}

    def _note_markets(self, rows: Any) -> None:
        for row in rows:
            self._markets.setdefault(row["ticker"], {}).update(
                {key: value for key, value in row.items() if value is not None} | {"source": "rest"}
            )

    def _note_lifecycle(self, table: pa.Table) -> None:
        """Let what a market's life told on the day complete the security master."""
        columns = [
            "ticker",
            "message_type",
            "event_type",
            "event_ticker",
            "title",
            "open_ns",
            "close_ns",
            "result",
            "settlement_value",
        ]
        for row in table.select(columns).to_pylist():
            event_type = row.pop("event_type")
            if "market_lifecycle" not in row.pop("message_type"):
                continue
            known = self._markets.setdefault(row["ticker"], {"source": "lifecycle"})
            known.update({key: value for key, value in row.items() if value is not None})
            if known["source"] == "lifecycle" and event_type in _STATUS:
                known["status"] = _STATUS[event_type]


_STATUS: Mapping[str, str] = {
    "created": "initialized",
    "activated": "active",
    "deactivated": "inactive",
    "determined": "determined",
    "settled": "finalized",
}


def _result(future: Future[_FiledUnit] | None) -> _FiledUnit | None:
    return None if future is None else future.result()


def _stream(batch: Batch) -> tuple[str, str]:
    return batch.header.conn, batch.header.channel


def _mapped(path: Path) -> memoryview:
    if path.stat().st_size == 0:  # cannot be mapped
        return memoryview(b"")
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _age(conn: str) -> tuple[int, int, str]:
    """Return what sorts connections by their beginning."""
    match = _CONN.fullmatch(conn)
    return (int(match["epoch"]), int(match["number"]), conn) if match else (0, 0, conn)


def _slice(conn: str) -> str:
    match = _CONN.fullmatch(conn)
    return match["slice"] if match else ""


def _replica(conn: str) -> str:
    match = _CONN.fullmatch(conn)
    return match["replica"] if match else "a"


def _connections(job: NormalizeJob, scanned: list[_Scanned]) -> dict[str, _Conn]:
    """Return all connections by id. A shard `b` is second to `a`, `b2` to `a2`, where that recorded at all.

    So is, within a shard, a connection that began while an earlier one was still up. One of a neighbour that recorded on is
    filed as the day's own if it was up when the day opened.
    """
    ended_ns = _ended_ns(job)
    lives: dict[str, tuple[int, int]] = {}
    of_day: dict[str, int | None] = {}
    for part in scanned:
        for header in (batch.header for batch in part.batches):
            low, high = lives.get(header.conn, (header.recv_first_ns, header.recv_first_ns))
            lives[header.conn] = min(low, header.recv_first_ns), max(high, _up_to_ns(header, ended_ns))
            of_day.setdefault(header.conn, part.neighbour)
    conns = {}
    firsts: dict[tuple[int | None, str], list[str]] = {}
    names = sorted(lives)
    for name in sorted(names, key=lambda name: (_replica(name) != "a", lives[name])):
        neighbour = of_day[name]
        recorded_on = neighbour is not None and job.neighbours[neighbour].recorded_on
        foreign = neighbour is not None and not (recorded_on and lives[name][1] > job.open_ns)
        place = (neighbour if foreign else None, _slice(name))
        before = firsts.setdefault(place, [])
        second = any(_replica(other) != _replica(name) or lives[name][0] < lives[other][1] for other in before)
        if _replica(name) == REST_CHANNEL:
            rank = REST
        elif second:
            rank = NEIGHBOUR_SECOND if foreign else SECOND
        else:
            rank = NEIGHBOUR_FIRST if foreign else FIRST
            before.append(name)
        conns[name] = _Conn(name, names.index(name), rank, neighbour)
    return conns


def _ended_ns(job: NormalizeJob) -> dict[str, int]:
    """Return when connections ended, of those behind which there is a gap."""
    return {str(gap.scope["conn"]): gap.from_ns for gap in job.gaps if gap.gap_id == f"gap-{gap.scope.get('conn')}"}


def _up_to_ns(header: BatchHeader, ended_ns: Mapping[str, int]) -> int:
    """Return until when a batch shows that its connection was up: the notes that a killed one owes come long after."""
    if header.channel != SESSION:
        return header.recv_last_ns
    return min(header.recv_last_ns, ended_ns.get(header.conn, header.recv_last_ns))


def _lives(job: NormalizeJob, scanned: list[_Scanned], conns: Mapping[str, _Conn]) -> list[Life]:
    """Return when each own connection recorded what: from the note that it is subscribed (else its first record) on."""
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    channels: dict[str, set[str]] = {}
    ended_ns = _ended_ns(job)
    for part in scanned:
        if part.neighbour is not None and not job.neighbours[part.neighbour].recorded_on:
            continue
        data = _mapped(Path(part.segment.path)) if part.segment.channel == SESSION else memoryview(b"")
        for batch in part.batches:
            header = batch.header
            if conns[header.conn].rank in (REST, *_FOREIGN):
                continue
            first[header.conn] = min(first.get(header.conn, header.recv_first_ns), header.recv_first_ns)
            last[header.conn] = max(last.get(header.conn, header.recv_first_ns), _up_to_ns(header, ended_ns))
            if part.segment.channel in TABLE_OF_CHANNEL:
                channels.setdefault(header.conn, set()).add(part.segment.channel)
            elif part.segment.channel == SESSION:
                subscribed = _subscribed(data, batch)
                if subscribed is not None:
                    at_ns, names = subscribed
                    first[header.conn] = max(first[header.conn], at_ns)
                    channels.setdefault(header.conn, set()).update(names)
    return [
        Life(conn, tuple(sorted(channels.get(conn, ()))), first[conn], last[conn] + 1)
        for conn in sorted(first, key=_age)
    ]


def _earlier_lives(
    job: NormalizeJob, scanned: list[_Scanned], conns: Mapping[str, _Conn]
) -> dict[str, tuple[int, int]]:
    """Return since and until when connections of the day before recorded near the boundary.

    What they received of this day is in its tables: where a roll was some seconds late, nothing is missing.
    """
    lives: dict[str, tuple[int, int]] = {}
    for part in scanned:
        if part.neighbour is None or job.neighbours[part.neighbour].open_ns >= job.open_ns:
            continue
        for header in (batch.header for batch in part.batches):
            if conns[header.conn].rank in _FOREIGN:
                low, high = lives.get(header.conn, (header.recv_first_ns, header.recv_last_ns + 1))
                lives[header.conn] = min(low, header.recv_first_ns), max(high, header.recv_last_ns + 1)
    return lives


def _subscribed(data: memoryview, batch: Batch) -> tuple[int, list[str]] | None:
    """Return when a `session` batch says that all was subscribed, and what; None where it does not."""
    try:
        records = decode_records(data, batch)
    except BatchDamagedError:
        return None  # named when it is read
    for line in records.splitlines():
        if b'"note":{"event":"subscribed"' in line:
            record = parse_record(line)
            assert record.note is not None
            return record.recv_ns, list(record.note.get("sids", {}))
    return None


def _sealed_between(event_ns: Any, recv_ns: Any, seals: tuple[int, ...]) -> Any:
    """Tell which rows happened before a seal and were received after it: a day that was started again goes on behind one."""
    between = np.zeros(len(event_ns), np.bool_)
    for sealed_ns in seals:
        between |= (event_ns < sealed_ns) & (recv_ns > sealed_ns)
    return between


def _typed(array: Any, kind: pa.DataType) -> Any:
    return array if array.type == kind else array.cast(kind)


def _first_of_record(name: str, rows: pa.Table) -> Any:
    return integers(rows["msg"]) == 0 if name == "orderbook" else np.ones(rows.num_rows, np.bool_)


def _core(unit: Unit, event_ns: Any) -> Any:
    """Tell which rows are of a unit itself and not of its margins."""
    inside = np.ones(len(event_ns), np.bool_)
    if unit.from_ns is not None:
        inside &= event_ns >= unit.from_ns
    if unit.to_ns is not None:
        inside &= event_ns < unit.to_ns
    return inside


class _WithoutPandas(MetaPathFinder):
    """Lets `import pandas` fail as if it were not installed; a None in `sys.modules` is taken for the module by Arrow's."""

    def find_spec(self, name: str, _path: object, _target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(name)


def main() -> None:
    """Read a job, do it, write the result."""
    job_path, result_path = map(Path, sys.argv[1:])
    # Arrow imports pandas, where it is installed, to see whether what it is given is of pandas: half a second for nothing.
    sys.meta_path.insert(0, _WithoutPandas())
    result = normalize_day(msgspec.json.decode(job_path.read_bytes(), type=NormalizeJob))
    result_path.write_bytes(msgspec.json.encode(result))


if __name__ == "__main__":
    main()
