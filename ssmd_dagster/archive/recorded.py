"""Finding recorded days: which there are, what their manifests claim, and which file holds a table.

Reads a local folder or S3 and nothing else, so that a researcher needs no server. Not here: the rows (`reader`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from pyarrow import fs

from ssmd_dagster.archive.drift import Drift
from ssmd_dagster.archive.layout import day_prefix, table_prefix
from ssmd_dagster.archive.tables import SCHEMAS
from ssmd_dagster.day.calendar import parse_date
from ssmd_dagster.day.events import Gap
from ssmd_dagster.day.payloads import ConditionValue
from ssmd_dagster.environments.home import ssmd_home
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.models import Environment, LocalStorage
from ssmd_dagster.environments.secrets import load_secrets
from ssmd_dagster.errors import (
    ConfigurationError,
    NotFoundError,
    RefusedError,
    SsmdError,
    UnreachableError,
    UsageError,
)

Dates = str | Date | Sequence[str | Date]
"""One day, or the first and the last of a range, both included; written `2025-12-14` or as a date."""

CONNECT_TIMEOUT_S, REQUEST_TIMEOUT_S = 3.0, 60.0
MAX_JSON_BYTES = 256 * 1024 * 1024

_MANIFEST = re.compile(r"manifest(?:\.r(?P<revision>[2-9]|[1-9][0-9]+))?\.json")
_TABLE = re.compile(r"data(?:\.r(?P<revision>[2-9]|[1-9][0-9]+))?\.parquet")
_FINDINGS = re.compile(r"data(?:\.r(?P<revision>[2-9]|[1-9][0-9]+))?\.json")
_REFUSED = re.compile(r"ACCESS_DENIED|FORBIDDEN|InvalidAccessKey|HTTP code 403")
_NUMBER = re.compile(r"[0-9]{2,4}")


class DayNotFoundError(NotFoundError):
    """Nothing is recorded of that day."""


class DayNotReadyError(RefusedError):
    """The day has no tables yet, or nobody has verified them."""


class BrokenFileError(SsmdError):
    """A file of the archive cannot be read as what its name says it is."""


class Sealed(msgspec.Struct, frozen=True, kw_only=True):
    """What readers need of a day's manifest; see `day.seal.Manifest`."""

    env: str
    date: str
    open_ns: int
    close_ns: int
    revision: int
    condition: ConditionValue
    condition_reasons: tuple[str, ...] = ()
    gaps: tuple[Gap, ...] = ()
    ledger: dict[str, Any] | None = None
    root_hash: str | None = None
    versions: dict[str, str] = {}
    created_at: str | None = None


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """What the normaliser noted beside the tables: unknown things, and batches that it could not read."""

    drift: tuple[Drift, ...] = ()
    damaged: tuple[str, ...] = ()


class TableFile(NamedTuple):
    """One table of one day: its path in the file system, size in bytes, and revision.

    `as_of` is the sealed revision of the day that it was found for, which may be a later one that left this table as it was.
    """

    table: str
    date: str
    path: str
    size: int
    revision: int
    as_of: int | None = None


class Recorded:
    """The recorded days of one environment.

    `tables` and `raw` are folders of `filesystem`, one feed's each; `raw` is None where only tables are at hand: manifests
    lie beside the raw files, so the condition of such days is not known. Methods raise `UnreachableError` or
    `ConfigurationError` where the store does not answer or refuses.
    """

    def __init__(self, name: str, filesystem: fs.FileSystem, *, tables: str, raw: str | None) -> None:
        self.name = name
        self.filesystem = filesystem
        self._tables = tables
        self._raw = raw

    @property
    def place(self) -> str:
        """Return where the tables lie: a folder, or bucket and folder of S3."""
        return self._tables

    @property
    def has_manifests(self) -> bool:
        """Say whether manifests are at hand."""
        return self._raw is not None

    def dates(self) -> list[str]:
        """Return all days of which there is a file, sorted."""
        found: set[str] = set()
        for root in [f"{self._tables}/v1/{table}" for table in SCHEMAS] + ([self._raw] if self._raw else []):
            for year in self._folders(root):
                for month in self._folders(f"{root}/{year}"):
                    found.update(f"{year}-{month}-{day}" for day in self._folders(f"{root}/{year}/{month}"))
        return sorted(found)

    def revisions(self, date: str) -> list[int]:
        """Return the day's sealed revisions, or, where manifests are not at hand, those of its tables."""
        if self._raw is None:
            return sorted({file.revision for table in SCHEMAS for file in self._files(date, table)})
        names = (info.base_name for info in self._listed(f"{self._raw}/{day_prefix('', date).strip('/')}"))
        return sorted(int(match["revision"] or 1) for name in names if (match := _MANIFEST.fullmatch(name)))

    def sealed(self, date: str, revision: int | None = None) -> Sealed | None:
        """Return what a day's manifest claims, by default the latest one's; None where there is none.

        Raises:
            NotFoundError: There is no such revision; names those that there are.
            BrokenFileError: The manifest cannot be read.
        """
        revisions = self.revisions(date)
        if revision is not None and revision not in revisions:
            known = ", ".join(f"r{number}" for number in revisions) or "none"
            raise NotFoundError(f"{date} has no revision r{revision}", where=self.name, do=f"Its revisions: {known}")
        if self._raw is None or not revisions:
            return None
        chosen = revisions[-1] if revision is None else revision
        name = "manifest.json" if chosen == 1 else f"manifest.r{chosen}.json"
        path = f"{self._raw}/{day_prefix('', date).strip('/')}/{name}"
        try:
            return msgspec.json.decode(self._read(path), type=Sealed)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BrokenFileError(
                f"the manifest cannot be read: {error}", where=path, do=f"Run `ssmd day verify` for {date}"
            ) from error

    def findings(self, date: str, revision: int | None = None) -> Findings:
        """Return what the normaliser noted as of a revision; nothing where it kept no notes.

        Raises:
            BrokenFileError: Its notes cannot be read.
        """
        names = {
            int(match["revision"] or 1): info.path
            for info in self._listed(f"{self._tables}/{table_prefix('', 'drift', date).strip('/')}")
            if (match := _FINDINGS.fullmatch(info.base_name))
        }
        known = [number for number in names if revision is None or number <= revision]
        if not known:
            return Findings()
        path = names[max(known)]
        try:
            return msgspec.json.decode(self._read(path), type=Findings)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise BrokenFileError(
                f"the normaliser's notes cannot be read: {error}",
                where=path,
                do="`ssmd day normalize` makes them again",
            ) from error

    def file(self, date: str, table: str, revision: int | None = None) -> TableFile | None:
        """Return the file of a table as of a sealed revision (None: the newest there is); None where there is none."""
        files = [file for file in self._files(date, table) if revision is None or file.revision <= revision]
        newest = max(files, key=lambda file: file.revision, default=None)
        return None if newest is None else newest._replace(as_of=revision)

    def not_recorded(self, date: str) -> DayNotFoundError:
        """Make the error of a day that is not there; it names the nearest ones."""
        known = self.dates()
        before = max((day for day in known if day < date), default=None)
        after = min((day for day in known if day > date), default=None)
        near = " and ".join(day for day in (before, after) if day is not None)
        do = f"The nearest recorded: {near}" if near else f"No day is recorded in {self.place}"
        return DayNotFoundError(
            f"{date} is not recorded",
            where=self.name,
            do=do if after else f"{do}; a day that is running can be read once it has ended",
        )

    def _read(self, path: str) -> bytes:
        with self._errors(path), self.filesystem.open_input_stream(path) as file:
            content: bytes = file.read(MAX_JSON_BYTES)
            return content

    def _files(self, date: str, table: str) -> list[TableFile]:
        folder = f"{self._tables}/{table_prefix('', table, date).strip('/')}"
        return [
            TableFile(table, date, info.path, info.size, int(match["revision"] or 1))
            for info in self._listed(folder)
            if (match := _TABLE.fullmatch(info.base_name))
        ]

    def _folders(self, path: str) -> list[str]:
        return [
            info.base_name
            for info in self._listed(path)
            if info.type == fs.FileType.Directory and _NUMBER.fullmatch(info.base_name)
        ]

    def _listed(self, path: str) -> list[fs.FileInfo]:
        with self._errors(path):
            found: list[fs.FileInfo] = self.filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
            return found

    @contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn what a file system raises into the errors of an operator."""
        try:
            yield
        except OSError as error:
            raise store_error(error, path) from error


def store_error(error: OSError, path: str) -> SsmdError:
    """Make the operator's error of a store's: no such file, access refused, or no answer."""
    text = str(error).partition("\n")[0]
    if isinstance(error, FileNotFoundError):
        return NotFoundError("no such file", where=path)
    if isinstance(error, PermissionError) or _REFUSED.search(text):
        return ConfigurationError(
            f"access refused: {text}", where=path, do="Check the credentials and rights of the store"
        )
    return UnreachableError(text, where=path, do="Check the store of the environment")


def find(env_or_path: str | Path) -> Recorded:
    """Find the recorded days of an environment by its name, or in a folder: local, or `s3://bucket/…`.

    A folder is one that holds the buckets of an environment, the bucket of its tables, or one feed's folder in it. For S3 an
    endpoint other than AWS goes into the query: `s3://bucket/folder?endpoint_override=host:9000&scheme=http`.

    Raises:
        NotFoundError: No such environment or folder, or it holds no tables.
        UsageError: The folder holds tables of several feeds.
    """
    text = str(env_or_path)
    if isinstance(env_or_path, str) and "/" not in text and not text.startswith((".", "~")):
        try:
            return of_environment(load_registry().get(text))
        except NotFoundError as error:
            if not Path(text).is_dir():
                raise
            raise NotFoundError(
                error.what, where=error.where, do=f"For the folder of that name say ./{text}"
            ) from error
    if "://" in text:
        try:
            filesystem, root = fs.FileSystem.from_uri(text)
        except (ValueError, OSError) as error:
            raise UsageError(f"not an address of a store: {text}: {error}", do="Expected s3://bucket/folder") from error
    else:
        filesystem, root = fs.LocalFileSystem(), str(Path(text).expanduser().absolute())
    return _in_folder(text, filesystem, root.rstrip("/"))


def of_environment(env: Environment) -> Recorded:
    """Find the recorded days of an environment.

    Raises:
        ConfigurationError: A credential of its store is missing.
    """
    home, storage = ssmd_home(), env.storage
    raw, normalized = storage.buckets.raw, storage.buckets.normalized
    if isinstance(storage, LocalStorage):
        root = storage.folder(home)
        filesystem: fs.FileSystem = fs.LocalFileSystem()
        return Recorded(env.name, filesystem, tables=f"{root}/{normalized}/{env.feed}", raw=f"{root}/{raw}/{env.feed}")
    secrets = load_secrets(home) if "s3" in env.keys else {}
    filesystem = fs.S3FileSystem(
        access_key=env.secret("s3", "access_key_id", secrets) if secrets else None,
        secret_key=env.secret("s3", "secret_access_key", secrets) if secrets else None,
        region=storage.region,
        endpoint_override=storage.endpoint,
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
    )
    folder = f"{storage.prefix}/{env.feed}" if storage.prefix else env.feed
    return Recorded(env.name, filesystem, tables=f"{normalized}/{folder}", raw=f"{raw}/{folder}")


def dates_of(recorded: Recorded, wanted: Dates) -> list[str]:
    """Return the dates that are meant: one as it is, of a range the recorded ones.

    Raises:
        UsageError: Not a date, or a range of other than two, or backwards.
        DayNotFoundError: No day of the range is recorded.
    """
    first, last = bounds_of(wanted)
    if _is_one(wanted):
        return [first]
    found = [date for date in recorded.dates() if first <= date <= last]
    if not found:
        error = recorded.not_recorded(first)
        raise DayNotFoundError(f"no day from {first} to {last} is recorded", where=error.where, do=error.do)
    return found


def bounds_of(wanted: Dates) -> tuple[str, str]:
    """Return the first and the last date that are meant.

    Raises:
        UsageError: Not a date, or a range of other than two, or backwards.
    """
    if _is_one(wanted):
        return _written(wanted), _written(wanted)
    assert isinstance(wanted, Sequence)
    if len(wanted) != 2:
        raise UsageError(f"a range has a first and a last day, got {len(wanted)}", do="Give one date, or two")
    first, last = (_written(one) for one in wanted)
    if last < first:
        raise UsageError(f"the range ends before it begins: {first} to {last}", do="Swap the dates")
    return first, last


def _is_one(wanted: Dates) -> bool:
    return isinstance(wanted, str | Date) or not isinstance(wanted, Sequence)


def _written(date: object) -> str:
    """Return a date as it is written; a time, such as pandas' `Timestamp`, stands for its date."""
    return date.strftime("%Y-%m-%d") if isinstance(date, Date) else parse_date(str(date)).isoformat()


def _in_folder(name: str, filesystem: fs.FileSystem, root: str) -> Recorded:
    def folders(path: str) -> list[str]:
        found: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    try:
        inside = folders(root)
        there = inside or filesystem.get_file_info(root).type == fs.FileType.Directory
        if "v1" in inside:
            return Recorded(name, filesystem, tables=root, raw=None)
        feeds = [feed for feed in inside if "v1" in folders(f"{root}/{feed}")]
        if feeds:
            return Recorded(name, filesystem, tables=f"{root}/{_only(feeds, name)}", raw=None)
        pairs = [(bucket, feed) for bucket in inside for feed in folders(f"{root}/{bucket}")]
        with_tables = [(bucket, feed) for bucket, feed in pairs if "v1" in folders(f"{root}/{bucket}/{feed}")]
    except OSError as error:
        raise UnreachableError(str(error).partition("\n")[0], where=name, do="Check the folder's address") from error
    if not with_tables:
        raise NotFoundError(
            "there are no tables in that folder" if there else "there is no such folder",
            where=name,
            do="Give the folder of the buckets, or the one of tables, such as …/ssmd-normalized",
        )
    bucket = _only([bucket for bucket, _ in with_tables], name)
    feed = _only([feed for _, feed in with_tables], name)
    raw = [other for other, its_feed in pairs if its_feed == feed and other != bucket]
    return Recorded(
        name,
        filesystem,
        tables=f"{root}/{bucket}/{feed}",
        raw=f"{root}/{raw[0]}/{feed}" if len(raw) == 1 else None,
    )


def _only(names: list[str], where: str) -> str:
    if len(names) > 1:
        raise UsageError(f"that folder holds several: {', '.join(names)}", where=where, do="Give one of them")
    return names[0]
