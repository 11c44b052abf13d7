"""The connector's local file of one connection: the batches as they will be published, fsynced first.

What is in the spool is safe from a crash of this process and of NATS. Not here: publishing, and what a batch means.
"""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ssmd_dagster.archive.batch import Batch, BatchDamagedError, decode_records, read_whole, scan, scan_back

_SUFFIX = ".batches"
_CONN = re.compile(r"(?P<epoch>\d+)-(?P<shard>[a-z]+[0-9]*)-(?P<number>\d+)")

_log = logging.getLogger(__name__)


def spool_path(directory: Path, conn: str) -> Path:
    """Return the spool file of a connection."""
    return directory / f"{conn}{_SUFFIX}"


def spooled_connections(directory: Path) -> list[str]:
    """Return the connections that have a spool file, oldest number first within an epoch and shard."""
    names = [path.name.removesuffix(_SUFFIX) for path in directory.glob(f"*{_SUFFIX}")]
    return sorted((n for n in names if _CONN.fullmatch(n)), key=_order)


def _order(conn: str) -> tuple[int, str, int]:
    epoch, shard, number = conn.rsplit("-", 2)
    return int(epoch), shard, int(number)


def shard_of(conn: str) -> str:
    """Return the shard of a connection id."""
    return _order(conn)[1]


def next_connection(directory: Path, epoch: int, shard: str, after: str | None = None) -> str:
    """Return a connection id, `{epoch}-{shard}-{number}`, that no spool file of the day has used yet.

    `after` is the last one that is known to be taken though its file may not be there: yet, or any more.
    """
    taken = [*spooled_connections(directory), *([after] if after is not None else [])]
    last = last_connection(taken, epoch, shard)
    return f"{epoch}-{shard}-{0 if last is None else _order(last)[2] + 1}"


def last_connection(conns: Iterable[str], epoch: int, shard: str) -> str | None:
    """Return the one of a shard and epoch that has the highest number; None where there is none."""
    mine = [conn for conn in conns if _CONN.fullmatch(conn) and conn.startswith(f"{epoch}-{shard}-")]
    return max(mine, key=_order, default=None)


class SpoolWriter:
    """Appends batches to the file of one connection; every append is on disk when it returns. The file is locked until `close`.

    Creating it for a connection that has a file raises `FileExistsError`: a connection id is never used again. An append
    that fails (full disk) leaves the file as it was and raises the `OSError`. For one thread at a time.
    """

    def __init__(self, directory: Path, conn: str) -> None:
        _make_directory(directory)
        self.path = spool_path(directory, conn)
        self.size_bytes = 0
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
            _fsync_directory(directory)
        except OSError:
            os.close(self._fd)
            self.path.unlink()
            raise

    def append(self, parts: list[bytes]) -> list[int]:
        """Write `parts` end to end with one fsync and return the offset of each."""
        offsets, offset = [], self.size_bytes
        try:
            for part in parts:
                offsets.append(offset)
                view = memoryview(part)
                while view:
                    written = os.pwrite(self._fd, view, offset)
                    view, offset = view[written:], offset + written
            os.fsync(self._fd)
        except OSError:
            os.ftruncate(self._fd, self.size_bytes)
            raise
        self.size_bytes = offset
        return offsets

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def is_written(path: Path) -> bool:
    """Tell whether a process has a spool file open to write it: then its end is not yet there."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _make_directory(directory: Path) -> None:
    """Make a folder and its missing parents, each durable in its own."""
    if not directory.is_dir():
        _make_directory(directory.parent)
        directory.mkdir(exist_ok=True, mode=0o700)
        _fsync_directory(directory.parent)


def _fsync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def read_spool(path: Path) -> Iterator[tuple[Batch, bytes]]:
    """Yield every whole batch of a spool file with its encoded bytes; a torn tail is passed over.

    Memory stays at one batch, whatever the size of the file.
    """
    with _mapped(path) as view:
        for item in scan(view):
            if isinstance(item, Batch):
                yield item, bytes(view[item.start : item.end])


def read_spool_back(path: Path) -> Iterator[tuple[Batch, bytes]]:
    """Yield what `read_spool` yields from the last batch to the first; the last ones come at once."""
    with _mapped(path) as view:
        for item in scan_back(view):
            if isinstance(item, Batch):
                yield item, bytes(view[item.start : item.end])


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    if path.stat().st_size == 0:  # cannot be mapped
        yield memoryview(b"")
        return
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        yield view


def spooled_records(encoded: bytes, batch: Batch) -> bytes:
    """Return the records of one batch that `read_spool` gave, checked against its header.

    Empty, which no whole batch is, where the disk has spoilt them; that is logged. Whoever reads on reads what is left.
    """
    try:
        return decode_records(encoded, Batch(batch.header, 0, batch.data_end - batch.start, batch.end - batch.start))
    except BatchDamagedError as error:
        _log.error("passed over in the spool: %s", error.what)
        return b""


def mend_spool(path: Path, batch: Batch, encoded: bytes) -> bool:
    """Put a copy of a spoilt batch in its place, fsynced; False, and nothing is written, where the copy is not the same."""
    copy = read_whole(encoded)
    if copy is None or copy.header != batch.header or len(encoded) != batch.end - batch.start:
        return False
    with path.open("r+b") as file:
        file.seek(batch.start)
        file.write(encoded)
        file.flush()
        os.fsync(file.fileno())
    return True


def append_to_spool(path: Path, end: int, encoded: bytes) -> None:
    """Cut a spool file whose process is gone behind its last whole batch, at `end`, and append one more, fsynced."""
    with path.open("r+b") as file:
        file.truncate(end)
        file.seek(end)
        file.write(encoded)
        file.flush()
        os.fsync(file.fileno())
