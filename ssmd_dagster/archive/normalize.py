"""A day's raw segments as tables: everything that was archived becomes a row of exactly one day, or is counted under why not.

Synchronous, over local files, within bounded memory whatever the size of the day; the same input gives the same bytes. It
runs as a process of its own, so that it can be killed: `python -m ssmd_dagster.archive.normalize JOB RESULT`. Not here:
fetching and storing (`workflows.normalize`), what a message means (the exchange's room), which copy of a thing is kept
(`filing`).
"""

from __future__ import annotations

import resource
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

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, Damage, decode_records, scan
from ssmd_dagster.archive.columns import BlockRows, read_block
from ssmd_dagster.archive.connections import (
    FOREIGN,
    Conn,
    Scanned,
    age,
    connections_of,
    earlier_lives_of,
    lives_of,
    mapped,
    replica_of,
    slice_of,
)
from ssmd_dagster.archive.coverage import Life, coverage_rows
from ssmd_dagster.archive.drift import DriftLog
from ssmd_dagster.archive.figures import Counting
from ssmd_dagster.archive.filing import (
    DUPLICATE,
    FIRST,
    NEIGHBOUR_FIRST,
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
from ssmd_dagster.archive.normalize_job import ChannelFiling, LateElsewhere, NormalizeJob, NormalizeResult, TableFile
from ssmd_dagster.archive.sheets import CapnpWriter, TableWriter
from ssmd_dagster.archive.spill import RUN_ROWS, UNIT_ROWS, Spill, Unit
from ssmd_dagster.archive.tables import SCHEMAS, TABLE_OF_CHANNEL, day_schema, table_from_rows
from ssmd_dagster.day.calendar import Window
from ssmd_dagster.exchange import REST as REST_CHANNEL
from ssmd_dagster.exchange import Row, row_reader

THREADS = 2
OPEN_FILES = 10_240
"""As many as macOS lets a process have; systemd gives 1,024, which is 150 million rows of a table."""
BLOCK_BYTES = 4 << 20
OVERLAP_NS = 60_000_000_000
"""How far from the day's edges the neighbouring days' batches are looked into."""
HOLE_MARGIN_NS = 10_000_000_000
"""So long before and after a hole of the first connection its second one's rows are compared."""


class _Block(NamedTuple):
    """Batches of one connection and channel that are read together."""

    channel: str
    conn: Conn
    data: memoryview
    batches: tuple[Batch, ...]
    key: str


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
        self._conns = connections_of(self._job, scanned)
        self._by_code = sorted(self._conns.values(), key=lambda conn: conn.code)
        self._lives = lives_of(self._job, scanned, self._conns)
        self._earlier = earlier_lives_of(self._job, scanned, self._conns)
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

    def _scan(self) -> list[Scanned]:
        """Read the headers of all batches; of the neighbours' only those near the day's edges are kept."""
        found = []
        for neighbour, segments in (
            (None, self._job.segments),
            *((i, n.segments) for i, n in enumerate(self._job.neighbours)),
        ):
            for segment in segments:
                data = mapped(Path(segment.path))
                batches = []
                for item in scan(data):
                    if isinstance(item, Damage) and neighbour is None:
                        self._damaged.append(
                            f"{Path(segment.path).name}: bytes {item.start}-{item.end} belong to no whole batch"
                        )
                    elif isinstance(item, Batch) and (neighbour is None or self._overlaps(item, neighbour)):
                        batches.append(item)
                found.append(Scanned(segment, neighbour, tuple(batches)))
        return found

    def _overlaps(self, batch: Batch, neighbour: int) -> bool:
        low, high = self._job.open_ns - OVERLAP_NS, self._job.close_ns + OVERLAP_NS
        if self._job.neighbours[neighbour].recorded_on:
            low = 0  # what made the books that the day opens with
        high = max(high, self._job.neighbours[neighbour].late_until_ns or high)
        return batch.header.recv_last_ns >= low and batch.header.recv_first_ns <= high

    def _know_connections(self) -> None:
        order = sorted(self._by_code, key=lambda conn: (conn.rank in FOREIGN, conn.neighbour or 0, age(conn.name)))
        place = np.zeros(len(order), np.int64)
        place[[conn.code for conn in order]] = np.arange(len(order))
        filling = {conn.code: self._holes_of_first(conn) for conn in order if conn.rank == SECOND}
        self._known = Connections(np.array([conn.rank for conn in self._by_code], np.int64), place, filling)

    def _holes_of_first(self, second: Conn) -> Spans:
        """Return when the first connections of a second one's shard recorded nothing or had a gap.

        Connections of one replica that overlap were not meant to: all that the later one has is compared.
        """
        part = slice_of(second.name)
        firsts = {conn.name for conn in self._by_code if conn.rank == FIRST and slice_of(conn.name) == part}
        if any(replica_of(name) == replica_of(second.name) for name in firsts):
            return spans(holes(()))
        intervals = holes((life.from_ns, life.to_ns) for life in self._lives if life.conn in firsts)
        for gap in self._job.gaps:
            conn = gap.scope.get("conn")
            component = str(gap.scope.get("component", ""))
            if conn in firsts or (conn is None and component in ("", f"connector-a{part}")):
                intervals.append((gap.from_ns, self._job.close_ns if gap.to_ns is None else gap.to_ns))
        return spans(intervals)

    def _blocks(self, scanned: list[Scanned]) -> Iterator[_Block]:
        for part in scanned:
            data = mapped(Path(part.segment.path))  # one at a time: what is mapped counts as memory
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

    def _block(self, part: Scanned, data: memoryview, group: list[Batch]) -> _Block:
        conn, channel = _stream(group[0])
        return _Block(channel, self._conns[conn], data, tuple(group), Path(part.segment.path).name)

    def _read_all(self, scanned: list[Scanned]) -> None:
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

    def _wanted(self, name: str, table: pa.Table, conn: Conn) -> pa.Table:
        """Leave out early what a second or a neighbour's connection adds nothing with."""
        if name == "trade" and conn.rank not in FOREIGN:
            return table
        recv_ns = integers(table["recv_ns"])
        if conn.rank not in FOREIGN:
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


def allow_open_files() -> None:
    """Raise this process's limit of open files: the more rows a day has, the more files they are put aside in (`spill`)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main() -> None:
    """Read a job, do it, write the result."""
    job_path, result_path = map(Path, sys.argv[1:])
    allow_open_files()
    # Arrow imports pandas, where it is installed, to see whether what it is given is of pandas: half a second for nothing.
    sys.meta_path.insert(0, _WithoutPandas())
    result = normalize_day(msgspec.json.decode(job_path.read_bytes(), type=NormalizeJob))
    result_path.write_bytes(msgspec.json.encode(result))


if __name__ == "__main__":
    main()
