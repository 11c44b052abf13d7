"""The log of the truth: every frame that was handed to a socket, written before it was handed over.

`TruthLog` writes it, `read_truth` reads it; a judge needs nothing else. Not for the exchange's own state.

A directory holds files `truth-{start_ns}-{number}.bin`, each a run of blocks: magic `TRU1`, kind (1 byte), body length
(u32), CRC-32 of the body (u32), body; little-endian. Kinds:

- `F` frames of one connection with one event time: connection u32, count u32, send_ns i64, event_ns i64 (0: none), fault
  u32 (0: none), then count x u64 `seq << 24 | sid << 8 | type`, count x u32 market, count x 32 bytes SHA-256 of the payload
- `N` names, JSON: `{"markets": {number: ticker}, "types": {number: type}}`, valid in this file from here on
- `E` anything else that happened, JSON: `{"note": "opened"|"closed"|"fault"|…, "at_ns": …}`

A block costs 44 bytes a frame. A torn tail, left by a killed process, ends its file silently.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"TRU1"
_HEAD = struct.Struct("<4scII")
_FRAMES = struct.Struct("<IIqqI")
_DIGEST_BYTES = 32
_MAX_BODY_BYTES = 256 << 20
_ROTATE_BYTES = 256 << 20
KEEP_BYTES = 16 << 30
"""Beyond this the oldest whole files are removed; the note `pruned` names each."""

TYPES = (
    "",
    "orderbook_delta",
    "orderbook_snapshot",
    "trade",
    "ticker",
    "market_lifecycle_v2",
    "event_lifecycle",
    "event_fee_update",
    "multivariate_market_lifecycle",
    "subscribed",
    "ok",
    "unsubscribed",
    "error",
    "unknown",
    "malformed",
    "played",
    "cfbenchmarks_value",
    "cfbenchmarks_value_5hz",
    "pyth_value",
    "cfbenchmarks_value_indexlist",
    "cfbenchmarks_value_5hz_indexlist",
    "pyth_value_underlying_list",
)
TYPE_CODE = {name: code for code, name in enumerate(TYPES)}


class Frame(NamedTuple):
    """One frame that was handed to a socket. `sid` and `seq` are 0 and `market` is "" where the frame has none."""

    connection: int
    sid: int
    seq: int
    send_ns: int
    event_ns: int
    type: str
    market: str
    sha256: bytes
    fault: int


class Note(NamedTuple):
    """Something else that happened: a connection opened or closed, a fault injected, the clock moved."""

    note: str
    at_ns: int
    data: dict[str, Any]


class TruthLog:
    """Writes the log; `names` gives the ticker of every market number but 0.

    Every call writes through to the operating system, so a killed process loses nothing it sent.
    """

    def __init__(
        self, directory: Path, start_ns: int, names: Mapping[int, str], *, keep_bytes: int = KEEP_BYTES
    ) -> None:
        if sys.byteorder != "little":
            raise RuntimeError("the truth log is written on little-endian machines only")
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._start_ns = start_ns
        self._number = 0
        self._named: set[int] = set()
        self._names = names
        self._keep_bytes = keep_bytes
        self.frames = 0
        self._fd = -1
        self._written = 0
        self._open()

    def _open(self) -> None:
        path = self._directory / f"truth-{self._start_ns:020d}-{self._number:05d}.bin"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
        self._number += 1
        self._written = 0
        self._named = {0}
        self._write(b"N", json.dumps({"types": dict(enumerate(TYPES)), "markets": {"0": ""}}).encode())

    def _write(self, kind: bytes, body: bytes) -> None:
        block = _HEAD.pack(MAGIC, kind, len(body), zlib.crc32(body)) + body
        view = memoryview(block)
        while view:
            view = view[os.write(self._fd, view) :]
        self._written += len(block)

    def sent(
        self,
        connection: int,
        send_ns: int,
        event_ns: int,
        fault: int,
        keys: list[int],
        markets: list[int],
        digests: list[bytes],
    ) -> None:
        """Log frames of one connection in the order in which they go out; call it just before the socket's write."""
        if self._written > _ROTATE_BYTES:
            os.close(self._fd)
            self._open()
            self._prune(send_ns)
        fresh = set(markets) - self._named
        if fresh:
            self._named |= fresh
            self._write(b"N", json.dumps({"markets": {str(number): self._names[number] for number in fresh}}).encode())
        count = len(keys)
        self.frames += count
        body = b"".join(
            (
                _FRAMES.pack(connection, count, send_ns, event_ns, fault),
                array("Q", keys).tobytes(),
                array("I", markets).tobytes(),
                *digests,
            )
        )
        self._write(b"F", body)

    def _prune(self, at_ns: int) -> None:
        files = sorted(self._directory.glob("truth-*.bin"))
        size = sum(path.stat().st_size for path in files)
        for path in files[:-1]:
            if size <= self._keep_bytes:
                return
            size -= path.stat().st_size
            path.unlink()
            self.note("pruned", at_ns, file=path.name)

    def note(self, note: str, at_ns: int, **data: Any) -> None:
        """Log something that is not a frame."""
        self._write(b"E", json.dumps({"note": note, "at_ns": at_ns, **data}).encode())

    def close(self) -> None:
        """Close the file; nothing may be logged afterwards."""
        os.close(self._fd)


def read_file(path: Path) -> Iterator[Frame | Note]:
    """Yield what one file holds, in order; end silently at a torn tail."""
    names: dict[int, str] = {}
    types: dict[int, str] = {}
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            magic, kind, length, crc = _HEAD.unpack(head)
            if magic != MAGIC or length > _MAX_BODY_BYTES:
                return
            body = file.read(length)
            if len(body) != length or zlib.crc32(body) != crc:
                return
            if kind == b"F":
                yield from _frames(body, names, types)
            elif kind == b"N":
                told = json.loads(body)
                names.update((int(number), name) for number, name in told.get("markets", {}).items())
                types.update((int(number), name) for number, name in told.get("types", {}).items())
            else:
                data = json.loads(body)
                yield Note(data.pop("note"), data.pop("at_ns"), data)


def _frames(body: bytes, names: dict[int, str], types: dict[int, str]) -> Iterator[Frame]:
    connection, count, send_ns, event_ns, fault = _FRAMES.unpack_from(body)
    keys, markets = array("Q"), array("I")
    offset = _FRAMES.size
    keys.frombytes(body[offset : offset + 8 * count])
    offset += 8 * count
    markets.frombytes(body[offset : offset + 4 * count])
    offset += 4 * count
    for index in range(count):
        key = keys[index]
        at = offset + index * _DIGEST_BYTES
        yield Frame(
            connection,
            key >> 8 & 0xFFFF,
            key >> 24,
            send_ns,
            event_ns,
            types[key & 0xFF],
            names[markets[index]],
            body[at : at + _DIGEST_BYTES],
            fault,
        )


def read_truth(directory: Path) -> Iterator[Frame | Note]:
    """Yield the whole log of a simulator's home (its `truth` folder), oldest first. Sizes are as in the module's text."""
    for path in sorted(directory.glob("truth-*.bin")):
        yield from read_file(path)
