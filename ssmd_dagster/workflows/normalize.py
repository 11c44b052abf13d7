"""Make a day's tables and put them beside its raw files: equal ones are left as they are, different ones open a revision.

Nothing is ever overwritten. The work itself is `archive.normalize`, in a process of its own that is killed with the verb. Not
here: the seal that makes a revision the day's (`sealing`), though `normalise_again` asks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from ssmd_dagster.archive.difference import MAX_ROWS, TableDifference, compare_tables
from ssmd_dagster.archive.drift import Drift, briefly
from ssmd_dagster.archive.layout import (
    Edge,
    capnp_key,
    day_prefix,
    drift_key,
    ordered_segments,
    parse_segment_key,
    table_key,
    table_prefix,
)
from ssmd_dagster.archive.normalize_job import (
    ChannelFiling,
    LateElsewhere,
    Neighbour,
    NormalizeJob,
    NormalizeResult,
    RawSegment,
    TableFile,
)
from ssmd_dagster.archive.sheets import sha256_of
from ssmd_dagster.archive.tables import SCHEMAS, TABLE_OF_CHANNEL
from ssmd_dagster.day.events import TradingDay
from ssmd_dagster.day.seal import TableEntry
from ssmd_dagster.day.states import DayState
from ssmd_dagster.environments.home import exchanges_dir, spool_dir
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.errors import NotFoundError, RefusedError, SsmdError
from ssmd_dagster.stores.objects import LocalObjectStore, ObjectExistsError, ObjectStore
from ssmd_dagster.workflows.damage import check_sealed
from ssmd_dagster.workflows.desk import Desk
from ssmd_dagster.workflows.late import judge_late_rows, late_of, tell_the_neighbours
from ssmd_dagster.workflows.recorded_on import recorded_before, recorded_into
from ssmd_dagster.workflows.sealing import seal_revision
from ssmd_dagster.workflows.verify import read_back

NORMALIZE_TIMEOUT_S = 6 * 3600.0
_UPLOADS = 8
_TELL_EVERY_S = 10.0
_ERROR_CHARS = 400
_ALLOCATORS = {"MALLOC_ARENA_MAX": "2", "MIMALLOC_PURGE_DELAY": "0"}
"""Give what a thread has freed back at once: a day's tables are made of many large blocks, one after the other."""

Tell = Callable[[str], None]


class Normalised(msgspec.Struct, frozen=True, kw_only=True):
    """The tables of a day as they are in the store now.

    `revision` is the newest of them, so the one to seal; `already` says that all of them were there before. `filings` are the
    last lines of the ledger by channel, `differences` what is new against the revision before, by table. `tables` are all
    objects of the revision, those of an earlier one that it leaves as they were among them.
    """

    revision: int
    already: bool
    tables: tuple[TableEntry, ...]
    filings: dict[str, ChannelFiling]
    drift: tuple[Drift, ...] = ()
    damaged: tuple[str, ...] = ()
    late: int = 0
    late_elsewhere: dict[str, LateElsewhere] = {}
    from_neighbours: dict[str, int] = {}
    differences: dict[str, TableDifference] = {}

    def rows(self) -> dict[str, int]:
        """Return the rows of each table."""
        return {
            name: entry.rows
            for entry in self.tables
            for name in SCHEMAS
            if f"/v1/{name}/" in entry.key and entry.key.endswith(".parquet")
        }


async def normalise(desk: Desk, day: TradingDay, *, told: Tell) -> Normalised:
    """Make the day's tables and store them, as the day's revision or, where other ones are there, as the next.

    Raises:
        SsmdError: The normaliser failed, with the end of its log, or the disk did; another run may succeed.
        UnreachableError: The store does not answer.
    """
    there = await _Stored.read(desk, day.date)
    revision = max([day.revision, *there.revisions])
    async with _workplace(desk, day.date) as folder:
        job = await _job(desk, day, folder, revision)
        result = await _run(desk, day.date, job, folder, told)
        different = await there.different(result, revision, told)
        differences: dict[str, TableDifference] = {}
        changed = {(file.table, file.ticker) for file in result.files if there.key_of(file, revision) is None}
        if different:
            for table in sorted({file.table for file in different if file.ticker is None}):
                old = await there.fetch(there.newest(table), folder / f"{table}.old.parquet")
                new = next(Path(file.path) for file in different if file.table == table and file.ticker is None)
                differences[table] = await asyncio.to_thread(compare_tables, table, old, new)
            changed |= {(file.table, file.ticker) for file in different}
            told(f"the tables differ from those that are there: {', '.join(differences) or 'trade'}")
            sealed = day.sealed is not None and day.sealed.revision >= revision
            own = any(there.key_of(file, revision) == _key(desk, day.date, file, revision) for file in different)
            if sealed or own:
                # This revision has its tables already. A day that was started again opens one that has none.
                revision += 1
                job = msgspec.structs.replace(job, revision=revision, output=str(folder / f"r{revision}"))
                result = await _run(desk, day.date, job, folder, told)
        uploads = [(file, _key(desk, day.date, file, revision)) for file in result.files if _is(file, changed)]
        entries = [TableEntry(key=key, size=file.size, sha256=file.sha256, rows=file.rows) for file, key in uploads]
        for file in result.files:
            if not _is(file, changed):
                entries.append(await there.entry(file, revision))
        await _upload(desk.stores.normalized, uploads, told)
        if uploads:
            await _store_findings(desk, day.date, revision, result)
    return Normalised(
        revision=revision,
        already=not uploads,
        tables=tuple(sorted(entries, key=lambda entry: entry.key)),
        filings=result.filings,
        drift=result.drift,
        damaged=result.damaged,
        late=result.late,
        late_elsewhere=result.late_elsewhere,
        from_neighbours=result.from_neighbours,
        differences=differences,
    )


async def normalise_again(desk: Desk, date: str, *, told: Tell, despite_damage: bool = False) -> Normalised:
    """Normalise a COMPLETE day; tables that are not sealed yet are sealed as the next revision.

    `despite_damage`: of raw objects that are spoilt or gone for good take what can still be read.

    Raises:
        NotFoundError: There is no such day.
        RefusedError: The day is not COMPLETE: its end makes its tables.
        UnexplainedDifferenceError: Its raw objects, or those of its neighbours that hold rows of it, are not those that were
            sealed, and `despite_damage` is not given.
    """
    day = (await desk.book.refresh()).days.get(date)
    if day is None:
        raise NotFoundError(f"there is no trading day {date}", where=desk.env, do=f"See `ssmd day history {desk.env}`.")
    if day.state is not DayState.COMPLETE:
        raise RefusedError(
            f"trading day {date} is {day.state}: its tables are made when it ends",
            where=desk.env,
            do=f"End it: `ssmd day end {desk.env} --date {date}`.",
        )
    if not despite_damage:
        await check_sealed(desk, day, date)
        for beside in _beside(desk, day):
            await check_sealed(desk, beside.day, date, beside.holding)
    done = await normalise(desk, day, told=told)
    await tell_the_neighbours(desk, done.late_elsewhere)
    if (late := late_of(day, done.late)) is not None:
        day = await judge_late_rows(desk, day, late)
    if day.sealed is not None and (not done.already or done.revision > day.sealed.revision):
        readback, _books, _ids = await read_back(desk, day, told)
        await seal_revision(desk, day, readback, done.tables, drift=briefly(done.drift))
    return done


def _is(file: TableFile, wanted: set[tuple[str, str | None]]) -> bool:
    return (file.table, file.ticker) in wanted


def _key(desk: Desk, date: str, file: TableFile, revision: int) -> str:
    feed = desk.setting.env.feed
    if file.ticker is not None:
        return capnp_key(feed, date, file.ticker, revision)
    return table_key(feed, file.table, date, revision)


class _Stored:
    """The tables that the store has of a day."""

    def __init__(self, desk: Desk, date: str, sizes: dict[str, int]) -> None:
        self._desk, self._date, self._sizes = desk, date, sizes
        self._store = desk.stores.normalized

    @classmethod
    async def read(cls, desk: Desk, date: str) -> _Stored:
        """List them."""
        feed, sizes = desk.setting.env.feed, dict[str, int]()
        for table in SCHEMAS:
            sizes |= {
                info.key: info.size for info in await desk.stores.normalized.list(table_prefix(feed, table, date))
            }
        return cls(desk, date, sizes)

    @property
    def revisions(self) -> set[int]:
        """Return the revisions of which any table is there."""
        return {revision for table in SCHEMAS for revision in self._revisions_of(table)}

    def _revisions_of(self, table: str) -> list[int]:
        feed = self._desk.setting.env.feed
        found: list[int] = []
        revision = 0
        last = sum(1 for key in self._sizes if f"/v1/{table}/" in key and key.endswith(".parquet"))
        while len(found) < last:
            revision += 1
            if table_key(feed, table, self._date, revision) in self._sizes:
                found.append(revision)
        return found

    def newest(self, table: str) -> str:
        """Return the key of a table's newest revision."""
        return table_key(self._desk.setting.env.feed, table, self._date, max(self._revisions_of(table)))

    def key_of(self, file: TableFile, revision: int) -> str | None:
        """Return the key of a file's newest revision up to `revision`, None where there is none."""
        for number in range(revision, 0, -1):
            if (key := _key(self._desk, self._date, file, number)) in self._sizes:
                return key
        return None

    async def entry(self, file: TableFile, revision: int) -> TableEntry:
        """Return what is claimed of a file that is there already, whose rows are those of `file`."""
        key = self.key_of(file, revision)
        assert key is not None
        return TableEntry(key=key, size=self._sizes[key], sha256=await self._sha256(key), rows=file.rows)

    async def different(self, result: NormalizeResult, revision: int, told: Tell) -> list[TableFile]:
        """Return the files that are there with other content."""
        found = []
        for file in result.files:
            key = self.key_of(file, revision)
            if key is not None and not await self._same(key, file, revision):
                found.append(file)
        return found

    async def _same(self, key: str, file: TableFile, revision: int) -> bool:
        own = key == _key(self._desk, self._date, file, revision)
        exact = file.ticker is not None or (own and file.rows > MAX_ROWS)
        same = (own or exact) and self._sizes[key] == file.size and await self._sha256(key) == file.sha256
        if same or exact:
            return same
        # The bytes also tell of the revision, of what columns mean and of connections without a row: the rows decide.
        old = await self.fetch(key, Path(file.path).with_suffix(".before"))
        difference = await asyncio.to_thread(compare_tables, file.table, old, Path(file.path))
        return difference == TableDifference(added=0, removed=0, changed=0)

    async def _sha256(self, key: str) -> str:
        if isinstance(self._store, LocalObjectStore):
            return await asyncio.to_thread(sha256_of, Path(self._store.url(key)))
        digest = hashlib.sha256()
        async for chunk in self._store.stream(key):
            digest.update(chunk)
        return digest.hexdigest()

    async def fetch(self, key: str, path: Path) -> Path:
        """Return a local file with an object's content: the object itself where the store is a folder."""
        return await _fetched(self._store, key, path)


async def _fetched(store: ObjectStore, key: str, path: Path) -> Path:
    if isinstance(store, LocalObjectStore):
        return Path(store.url(key))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        async for chunk in store.stream(key):
            await asyncio.to_thread(file.write, chunk)
    return path


@contextlib.asynccontextmanager
async def _workplace(desk: Desk, date: str) -> AsyncIterator[Path]:
    """Give a folder of one's own below the home, and remove it and those that killed verbs left behind."""
    root = desk.setting.home / "normalize"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in root.iterdir():
        if not _lives(left.name):
            await asyncio.to_thread(shutil.rmtree, left, ignore_errors=True)
    folder = root / f"{desk.env}.{date}.{os.getpid()}.{time.monotonic_ns()}"
    folder.mkdir()
    try:
        yield folder
    finally:
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


def _lives(name: str) -> bool:
    try:
        os.kill(int(name.split(".")[2]), 0)
    except (ProcessLookupError, ValueError, IndexError):
        return False
    except PermissionError:
        return True
    return True


async def _job(desk: Desk, day: TradingDay, folder: Path, revision: int) -> NormalizeJob:
    env = desk.setting.env
    window = desk.window(day)
    days = (await desk.book.refresh()).days
    return NormalizeJob(
        feed=env.feed,
        env=env.name,
        date=day.date,
        revision=revision,
        open_ns=window.open_ns,
        close_ns=window.close_ns,
        output=str(folder / f"r{revision}"),
        segments=await _segments(desk, day.date, folder),
        neighbours=await _neighbours(desk, day, folder),
        gaps=day.gaps,
        channels=tuple(env.capture.channels),
        markets=tuple(await desk.stores.secmaster.known(window.open_ns, window.close_ns)),
        seals=days[day.date].sealed_ns,
        capnp_schema=str(_schema_file(desk)) if "capnp" in env.formats else None,
    )


def _schema_file(desk: Desk) -> Path:
    """Return the Cap'n Proto file of the environment's schema; the loader has checked its SHA-256."""
    name, _, wanted = desk.setting.env.schema_ref.partition(":")
    versions = load_registry().schemas[name].versions
    return exchanges_dir() / "schemas" / next(one.file for one in versions if one.version == wanted)


async def _segments(
    desk: Desk, date: str, folder: Path, holding: Callable[[Iterable[str]], list[str]] = ordered_segments
) -> tuple[RawSegment, ...]:
    """Return a day's segments, or those that `holding` chooses of their keys, as local files."""
    segments = []
    for key in holding(info.key for info in await desk.stores.raw.list(day_prefix(desk.setting.env.feed, date))):
        path = await _fetched(desk.stores.raw, key, folder / "raw" / key.replace("/", "_"))
        parsed = parse_segment_key(key)
        assert parsed is not None
        segments.append(RawSegment(channel=parsed[0], path=str(path)))
    return tuple(segments)


class Beside(NamedTuple):
    """A day beside another, and the edge at which its raw files may have rows of that one; None: anywhere in it."""

    day: TradingDay
    edge: Edge | None
    late_until_ns: int | None
    recorded_on: bool

    def holding(self, keys: Iterable[str]) -> list[str]:
        """Return the segments that may have rows of the other day; where this one recorded on, also how long it did."""
        return ordered_segments(keys, self.edge, None if self.recorded_on else TABLE_OF_CHANNEL)


def _beside(desk: Desk, day: TradingDay) -> list[Beside]:
    """Return the days whose raw files may have rows of this one: the last that was recorded before it, and the next one.

    The one before counts where its window meets this one's, and all of it where it recorded on far into this one, over whatever
    days nobody started in between. Where the next day is known to have received late rows, all of that counts.
    """
    found = []
    before = recorded_before(desk, day)
    if before is not None:
        recorded_on = recorded_into(desk, before, day)
        if recorded_on or desk.window(before).close_ns >= desk.window(day).open_ns:
            found.append(Beside(before, None if recorded_on else "last", None, recorded_on))
    later = [one for one in desk.book.book.days.values() if one.date > day.date and one.recorded_with is None]
    if later:
        late_until_ns = None if day.late is None else day.late.until_ns
        following = min(later, key=lambda one: one.date)
        found.append(Beside(following, "first" if late_until_ns is None else None, late_until_ns, recorded_on=False))
    return found


async def _neighbours(desk: Desk, day: TradingDay, folder: Path) -> tuple[Neighbour, ...]:
    """Return the days beside this one with what their raw files may have of it.

    The next day's first segment is often not stored yet; then its spool is read, where it is on this host.
    """
    found = []
    for beside in _beside(desk, day):
        date = beside.day.date
        segments = await _segments(desk, date, folder, beside.holding)
        if not segments:
            try:
                segments = _spooled(spool_dir(desk.setting.home, desk.env, date), folder / "raw")
            except FileNotFoundError:  # its day was sealed meanwhile, so its segments are in the store
                segments = await _segments(desk, date, folder, beside.holding)
        window = desk.window(beside.day)
        found.append(
            Neighbour(
                date=date,
                open_ns=window.open_ns,
                close_ns=window.close_ns,
                segments=segments,
                seals=beside.day.sealed_ns,
                late_until_ns=beside.late_until_ns,
                recorded_on=beside.recorded_on,
                gaps=beside.day.gaps,
            )
        )
    return tuple(found)


def _spooled(spool: Path, folder: Path) -> tuple[RawSegment, ...]:
    """Return links to a neighbour's spool files: they stay readable if that day is sealed and lets them go meanwhile."""
    folder.mkdir(parents=True, exist_ok=True)
    links = []
    for path in sorted(spool.glob("*.batches")):
        link = folder / f"{spool.name}.{path.name}"
        try:
            link.hardlink_to(path)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.copyfile(path, link)  # the spool is on another disk
        links.append(RawSegment(channel="", path=str(link)))
    return tuple(links)


async def _run(desk: Desk, date: str, job: NormalizeJob, folder: Path, told: Tell) -> NormalizeResult:
    """Do a job in a process of its own; it does not outlive this coroutine."""
    job_path, result_path, log_path = (folder / f"r{job.revision}.{name}" for name in ("job", "result", "log"))
    job_path.write_bytes(msgspec.json.encode(job))
    with log_path.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "ssmd_dagster.archive.normalize", str(job_path), str(result_path),
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, **_ALLOCATORS},
        )  # fmt: skip
        try:
            began_s = time.monotonic()
            deadline_s = began_s + NORMALIZE_TIMEOUT_S
            while process.returncode is None and time.monotonic() < deadline_s:
                with contextlib.suppress(TimeoutError):  # looks again, and says that it is still at work
                    await asyncio.wait_for(process.wait(), _TELL_EVERY_S)
                if process.returncode is None:
                    told(f"the tables are being made, since {time.monotonic() - began_s:.0f} s")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if process.returncode != 0:
        log_lines = log_path.read_text(errors="replace").splitlines() or ["without a word"]
        raise SsmdError(
            f"the normaliser ended with exit code {process.returncode}: {log_lines[-1][:_ERROR_CHARS]}",
            where=desk.where(date),
            do=f"Raw files are complete without it; try again: `ssmd day normalize {desk.env} --date {date}`.",
        )
    return msgspec.json.decode(result_path.read_bytes(), type=NormalizeResult)


async def _upload(store: ObjectStore, files: Sequence[tuple[TableFile, str]], told: Tell) -> None:
    limit = asyncio.Semaphore(_UPLOADS)

    async def put(file: TableFile, key: str) -> None:
        async with limit:
            try:
                await store.create(key, Path(file.path))
            except ObjectExistsError as error:
                there = hashlib.sha256()
                async for chunk in store.stream(key):
                    there.update(chunk)
                if there.hexdigest() != file.sha256:  # an own retry after a lost answer finds its own bytes
                    raise SsmdError(
                        "another normaliser stored other tables at the same time",
                        where=store.url(key),
                        do="Run it again.",
                    ) from error

    async with asyncio.TaskGroup() as group:
        for file, key in files:
            group.create_task(put(file, key))
    if files:
        told(f"{len(files)} files of tables stored")


async def _store_findings(desk: Desk, date: str, revision: int, result: NormalizeResult) -> None:
    """Keep the account of the run beside the tables: drift with its examples, filings, damaged batches."""
    findings = msgspec.structs.replace(result, files=())
    raw = msgspec.json.format(msgspec.json.encode(findings), indent=1)
    with contextlib.suppress(ObjectExistsError):  # the tables of a run that was cut off before its last file
        await desk.stores.normalized.create(drift_key(desk.setting.env.feed, date, revision), raw)
