"""The exchange's own list of trades: on disk before anyone hears of them, listed newest first over REST.

Rows lie in `trades/rows-{n}.jsonl` as REST shows them, one a line; `trades/index-{n}.bin` holds 24 bytes a trade (time in
µs i64, offset u64, market u32, length u32), `trades/names.txt` the tickers of the market numbers. The newest
`TRADES_KEPT` trades are kept, over restarts too. Not for the WebSocket's frames.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from pathlib import Path

ROWS_PER_FILE = 500_000
TRADES_KEPT = 5_000_000
"""About as many of the newest trades stay listed; whole files go when they are no longer needed for it."""
_FILES_KEPT = 200
_STEP_BACK_US = 1_000_000
_ENTRY = struct.Struct("<qQII")


class _File:
    """One pair of files and its index in memory."""

    def __init__(self, folder: Path, number: int) -> None:
        self.number = number
        self.rows_path = folder / f"rows-{number:06d}.jsonl"
        self.index_path = folder / f"index-{number:06d}.bin"
        self.rows_fd = os.open(self.rows_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.index_fd = os.open(self.index_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        size = os.fstat(self.rows_fd).st_size
        entries = list(_ENTRY.iter_unpack(_whole(os.pread(self.index_fd, os.fstat(self.index_fd).st_size, 0))))
        # A killed process may leave rows without an index entry, or half an entry; never an entry without its row.
        entries = [entry for entry in entries if entry[1] + entry[3] <= size]
        os.ftruncate(self.index_fd, len(entries) * _ENTRY.size)
        self.size = entries[-1][1] + entries[-1][3] + 1 if entries else 0
        os.ftruncate(self.rows_fd, self.size)
        self.times_us = [entry[0] for entry in entries]
        self.offsets = [entry[1] for entry in entries]
        self.markets = [entry[2] for entry in entries]
        self._by_market: dict[int, list[int]] = {}
        self._sorted = 0

    def of_market(self, market: int) -> list[int]:
        """Return the positions of a market's trades; sorts in what was added since the last question."""
        for position in range(self._sorted, len(self.markets)):
            self._by_market.setdefault(self.markets[position], []).append(position)
        self._sorted = len(self.markets)
        return self._by_market.get(market, [])

    def row(self, position: int) -> bytes:
        end = self.offsets[position + 1] if position + 1 < len(self.offsets) else self.size
        return os.pread(self.rows_fd, end - self.offsets[position] - 1, self.offsets[position])

    def close(self) -> None:
        os.close(self.rows_fd)
        os.close(self.index_fd)

    def remove(self) -> None:
        self.close()
        self.rows_path.unlink()
        self.index_path.unlink()


def _whole(raw: bytes) -> bytes:
    return raw[: len(raw) // _ENTRY.size * _ENTRY.size]


class TradeBook:
    """Keeps the newest trades. Pages follow the order in which trades were added."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        numbers = sorted(int(path.stem.removeprefix("rows-")) for path in folder.glob("rows-*.jsonl"))
        self._files = [_File(folder, number) for number in numbers] or [_File(folder, 1)]
        self._names_fd = os.open(folder / "names.txt", os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        names = os.pread(self._names_fd, os.fstat(self._names_fd).st_size, 0)
        os.ftruncate(self._names_fd, names.rfind(b"\n") + 1)
        self._numbers = {name.decode(): number for number, name in enumerate(names.split(b"\n")[:-1])}
        self._rows: list[bytes] = []
        self._entries: list[bytes] = []
        self._names: list[bytes] = []

    def __len__(self) -> int:
        return sum(len(file.times_us) for file in self._files)

    def add(self, time_us: int, ticker: str, row: bytes) -> None:
        """Add one trade; `flush` before anyone hears of it."""
        number = self._numbers.get(ticker)
        if number is None:
            number = self._numbers[ticker] = len(self._numbers)
            self._names.append(ticker.encode() + b"\n")
        file = self._files[-1]
        if file.times_us and time_us < file.times_us[-1]:
            if time_us > file.times_us[-1] - _STEP_BACK_US:
                time_us = file.times_us[-1]
            else:
                # Times ascend within a file, so that they can be searched; a clock that was set back begins another.
                self.flush()
                file = self._roll()
        file.times_us.append(time_us)
        file.offsets.append(file.size)
        file.markets.append(number)
        self._entries.append(_ENTRY.pack(time_us, file.size, number, len(row)))
        self._rows.append(row)
        file.size += len(row) + 1

    def flush(self) -> None:
        """Write what was added: names, rows, then the index."""
        if not self._rows:
            return
        file = self._files[-1]
        if self._names:
            _write_all(self._names_fd, b"".join(self._names))
        _write_all(file.rows_fd, b"\n".join(self._rows) + b"\n")
        _write_all(file.index_fd, b"".join(self._entries))
        self._rows, self._entries, self._names = [], [], []
        if len(file.times_us) >= ROWS_PER_FILE:
            self._roll()

    def _roll(self) -> _File:
        self._files.append(_File(self._folder, self._files[-1].number + 1))
        while len(self) - len(self._files[0].times_us) >= TRADES_KEPT or len(self._files) > _FILES_KEPT:
            self._files.pop(0).remove()
        return self._files[-1]

    def page(
        self, *, ticker: str | None, min_us: int | None, max_us: int | None, limit: int, cursor: tuple[int, int] | None
    ) -> tuple[list[bytes], tuple[int, int] | None]:
        """Return up to `limit` rows from the newest down, below `cursor`, and the cursor of the next page.

        `min_us` and `max_us` are inclusive. A cursor is (file, position) of the last row returned.
        """
        self.flush()
        rows: list[bytes] = []
        last: tuple[int, int] | None = None
        for file, position in self._positions(ticker, min_us, max_us, cursor):
            if len(rows) == limit:
                return rows, last
            rows.append(file.row(position))
            last = file.number, position
        return rows, None

    def holds(self, min_us: int, max_us: int) -> bool:
        """Tell whether any trade lies in the inclusive interval."""
        return any(bisect_left(file.times_us, min_us) < bisect_right(file.times_us, max_us) for file in self._files)

    def newest_first(
        self, ticker: str | None, min_us: int, max_us: int, below: tuple[int, int] | None
    ) -> Iterator[tuple[int, bytes, tuple[int, int]]]:
        """Yield `(time, row, cursor)` of the trades in the inclusive interval, from the newest below `below` down."""
        self.flush()
        for file, position in self._positions(ticker, min_us, max_us, below):
            yield file.times_us[position], file.row(position), (file.number, position)

    def _positions(
        self, ticker: str | None, min_us: int | None, max_us: int | None, cursor: tuple[int, int] | None
    ) -> Iterator[tuple[_File, int]]:
        market = self._numbers.get(ticker) if ticker else None
        if ticker and market is None:
            return
        for file in reversed(self._files):
            if cursor and file.number > cursor[0]:
                continue
            times = file.times_us
            low = 0 if min_us is None else bisect_left(times, min_us)
            high = len(times) if max_us is None else bisect_right(times, max_us)
            if cursor and file.number == cursor[0]:
                high = min(high, cursor[1])
            if market is None:
                yield from ((file, position) for position in range(high - 1, low - 1, -1))
            else:
                mine = file.of_market(market)
                first, end = bisect_left(mine, low), bisect_left(mine, high)
                yield from ((file, position) for position in reversed(mine[first:end]))

    def close(self) -> None:
        """Write what is left and close the files."""
        self.flush()
        for file in self._files:
            file.close()
        os.close(self._names_fd)


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]
