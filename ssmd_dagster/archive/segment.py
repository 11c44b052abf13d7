"""A channel's segment while it grows: batches end to end, small neighbours joined, a footer at its end.

The archiver's log format. Local bytes only: what reaches the object store, and when, is the archiver's business.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from ssmd_dagster.archive.batch import (
    Batch,
    BatchHeader,
    SegmentFooter,
    decode_records,
    encode_batch,
    encode_footer,
    join_headers,
    seq_spans,
    seqs_join_up,
)
from ssmd_dagster.archive.records import sequences_in

JOIN_BELOW_BYTES = 256 << 10
"""Batches with this many bytes of records or more are passed on as they are."""
JOIN_UP_TO_BYTES = 4 << 20
CLOSE_AT_BYTES = 64 << 20
CLOSE_AFTER_S = 3600.0

Ranges = dict[str, list[tuple[int, int]]]
"""Per connection the inclusive ranges of batch numbers, sorted and apart."""


def add_range(ranges: Ranges, conn: str, first: int, last: int) -> None:
    """Put `[first, last]` into `ranges`, merging what touches."""
    known = ranges.setdefault(conn, [])
    if known and known[-1][1] + 1 == first:  # the usual case: the next batch of the connection
        known[-1] = (known[-1][0], last)
        return
    merged: list[tuple[int, int]] = []
    for low, high in sorted([*known, (first, last)]):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    ranges[conn] = merged


def in_ranges(ranges: Ranges, conn: str, batch: int) -> bool:
    """Tell whether a batch number lies in one of the connection's ranges."""
    return any(low <= batch <= high for low, high in reversed(ranges.get(conn, ())))


class SegmentWriter:
    """Builds one segment of one channel in a local file.

    `append` takes batches in any order, at most once each; those of less than `JOIN_BELOW_BYTES` wait in memory (at
    most `JOIN_UP_TO_BYTES` a connection) until they have neighbours to be joined with. `close` writes what waits and
    the footer. The file is disposable, so nothing is fsynced. After an `OSError` (a full disk) it is good for `discard` only.
    """

    def __init__(self, path: Path, *, env: str, day: str, channel: str, number: int, prev_sha256: str | None) -> None:
        self.path = path
        self.channel = channel
        self.number = number
        self.size_bytes = 0
        self.batches = 0
        self.records = 0
        self.ranges: Ranges = {}
        self.sha256 = ""
        self._env, self._day, self._prev_sha256 = env, day, prev_sha256
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        self._open = True
        self._hash = hashlib.sha256()
        self._waiting: dict[str, list[tuple[BatchHeader, bytes]]] = {}
        self._waiting_bytes: dict[str, int] = {}

    @property
    def empty(self) -> bool:
        """Tell whether nothing has been appended."""
        return self.batches == 0

    def append(self, buffer: bytes, batch: Batch) -> None:
        """Take one batch; a damaged one raises `BatchDamagedError` if it had to be looked into, and is not taken."""
        header = batch.header
        if header.bytes >= JOIN_BELOW_BYTES:
            self._write_waiting(header.conn)
            self._write(buffer[batch.start : batch.end])
        else:
            records = decode_records(buffer, batch)
            waiting = self._waiting.setdefault(header.conn, [])
            if waiting and (
                waiting[-1][0].span[1] + 1 != header.span[0]
                or waiting[-1][0].epoch != header.epoch
                or self._waiting_bytes[header.conn] + len(records) > JOIN_UP_TO_BYTES
            ):
                self._write_waiting(header.conn)
                waiting = self._waiting.setdefault(header.conn, [])
            waiting.append((header, records))
            self._waiting_bytes[header.conn] = self._waiting_bytes.get(header.conn, 0) + len(records)
        add_range(self.ranges, header.conn, *header.span)
        self.batches += 1
        self.records += header.records

    def _write_waiting(self, conn: str) -> None:
        waiting = self._waiting.pop(conn, None)
        self._waiting_bytes.pop(conn, None)
        if waiting:
            records = b"".join(part for _, part in waiting)
            headers = [h for h, _ in waiting]
            header = join_headers(headers, hashlib.sha256(records).hexdigest())
            if len(headers) > 1 and not seqs_join_up(headers):
                header = msgspec.structs.replace(header, seq=seq_spans(sequences_in(records)))
            self._write(encode_batch(header, records))

    def _write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self._hash.update(data)
        self.size_bytes += len(data)

    @property
    def waiting_bytes(self) -> int:
        """Return the bytes of records that wait in memory to be joined."""
        return sum(self._waiting_bytes.values())

    def close(self, epoch: int) -> SegmentFooter:
        """Write what waits and the footer, set `sha256` and `size_bytes`, and close the file."""
        for conn in list(self._waiting):
            self._write_waiting(conn)
        footer = SegmentFooter(
            v=1,
            footer=True,
            env=self._env,
            day=self._day,
            channel=self.channel,
            segment=self.number,
            epoch=epoch,
            prev_sha256=self._prev_sha256,
            batches=self.batches,
            records=self.records,
            ranges={conn: tuple(ranges) for conn, ranges in self.ranges.items()},
        )
        self._write(encode_footer(footer))
        self._close_file()
        self.sha256 = self._hash.hexdigest()
        return footer

    def discard(self) -> None:
        """Close and remove the file, keeping nothing."""
        self._close_file()
        self.path.unlink(missing_ok=True)

    def _close_file(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)


def covered(footers: Iterable[SegmentFooter]) -> Iterator[tuple[str, int, int]]:
    """Yield `(conn, first, last)` for every range of batches that the segments hold."""
    for footer in footers:
        for conn, ranges in footer.ranges.items():
            for first, last in ranges:
                yield conn, first, last
