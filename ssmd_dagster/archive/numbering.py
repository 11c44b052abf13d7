"""The exchange's own numbering: which sequence numbers of one subscription are in the archive, and which are missing.

Numbers count from 1 per (connection, sid) over all channels. Kept as runs, so that memory grows with what is odd, not with
what is there. Not here: why a number is missing.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import msgspec
import numpy as np

from ssmd_dagster.archive.batch import BatchHeader
from ssmd_dagster.archive.records import sequences_in

MAX_HOLE = 10_000_000
"""More numbers than these are never missing between two: the exchange has begun to number anew, or a number is not one."""
_MAX_NUMBER = 2**63 - 1
Run = tuple[int, int]
"""Consecutive numbers, both ends inclusive."""


def cut(holes: Iterable[Run], known: Run) -> tuple[list[Run], int]:
    """Take known numbers out of holes; return what is left and how many were taken."""
    left: list[Run] = []
    size = 0
    for first, last in holes:
        low, high = max(first, known[0]), min(last, known[1])
        if low > high:
            left.append((first, last))
            continue
        size += high - low + 1
        left += [run for run in ((first, low - 1), (high + 1, last)) if run[0] <= run[1]]
    return left, size


class WireCount(msgspec.Struct, frozen=True):
    """What the archive holds of one subscription's numbers: `holes` are the runs that are missing between them."""

    conn: str
    sid: int
    distinct: int
    duplicates: int
    holes: tuple[Run, ...] = ()

    @property
    def missing(self) -> int:
        """Return how many numbers are missing."""
        return sum(last - first + 1 for first, last in self.holes)


class Numbering:
    """Collects the numbers of one subscription, in any order."""

    def __init__(self) -> None:
        self._runs: list[Run] = []
        self._occurrences = 0

    def add_run(self, first: int, last: int) -> None:
        """Take numbers that came without a hole or a repetition."""
        self._occurrences += last - first + 1
        if self._runs and self._runs[-1][1] + 1 == first:
            self._runs[-1] = (self._runs[-1][0], last)
        else:
            self._runs.append((first, last))

    def add(self, numbers: Sequence[int]) -> None:
        """Take numbers as they came, at least one; those that no 64 bits hold are none."""
        numbers = [number for number in numbers if -_MAX_NUMBER <= number <= _MAX_NUMBER]
        if not numbers:
            return
        distinct = np.unique(np.array(numbers, dtype=np.int64))
        breaks = np.flatnonzero(np.diff(distinct) > 1)
        firsts, lasts = distinct[np.append(0, breaks + 1)], distinct[np.append(breaks, len(distinct) - 1)]
        for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True):
            self.add_run(first, last)
        self._occurrences += len(numbers) - len(distinct)

    def count(self, conn: str, sid: int, *, from_one: bool) -> WireCount:
        """Return what was collected. `from_one`: the subscription's beginning was seen, so numbers below the first are holes."""
        runs = sorted(self._runs)
        distinct, expected = 0, min(1, runs[0][0]) if from_one else runs[0][0]
        holes: list[Run] = []
        for first, last in runs:
            if 0 < first - expected <= MAX_HOLE:
                holes.append((expected, first - 1))
            distinct += max(0, last + 1 - max(first, expected))
            expected = max(expected, last + 1)
        return WireCount(conn, sid, distinct, self._occurrences - distinct, tuple(holes))


class Numberings:
    """Collects the numbers of all subscriptions, batch by batch, in any order."""

    def __init__(self) -> None:
        self._of: dict[tuple[str, int], Numbering] = {}

    def feed(self, header: BatchHeader, records: bytes) -> None:
        """Take a batch's numbers: from the header where it leaves no question, else from the records."""
        if not header.seq:
            return
        runs = header.seq.values()
        if sum(distinct for _, _, distinct in runs) == header.records and all(
            high - low + 1 == distinct for low, high, distinct in runs
        ):
            for sid, (low, high, _) in header.seq.items():
                self._numbering(header.conn, int(sid)).add_run(low, high)
        else:
            for number, seqs in sequences_in(records).items():
                self._numbering(header.conn, number).add(seqs)

    def feed_spoilt(self, header: BatchHeader) -> None:
        """Take the numbers of a batch that only its header tells of, where that leaves no question."""
        for sid, (low, high, distinct) in header.seq.items():
            if high - low + 1 == distinct:
                self._numbering(header.conn, int(sid)).add_run(low, high)

    def counts(self, announced: Container[tuple[str, int]] = ()) -> tuple[WireCount, ...]:
        """Return what was collected; of the `announced` (connection, sid) the beginning was seen: they count from 1."""
        return tuple(numbers.count(*place, from_one=place in announced) for place, numbers in sorted(self._of.items()))

    def _numbering(self, conn: str, sid: int) -> Numbering:
        return self._of.setdefault((conn, sid), Numbering())
