"""Which batches of a day its segments do not give back, whether they were spoilt, cut off or deleted, and when they came in.

Batches of a connection and channel are numbered from 0 without a hole, and the recorder's notes say how far they went. Not
here: whether another copy exists, and what follows from a loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import msgspec

from ssmd_dagster.archive.batch import BatchHeader
from ssmd_dagster.archive.intervals import Interval
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.payloads import GapOpened
from ssmd_dagster.exchange import SESSION

Place = tuple[str, str]
"""Connection and channel."""
_UNENDED = 2**63 - 1


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Batches `first` to `last` of one channel of a connection; `last` None: all that came behind.

    They were received between `from_ns` and `to_ns`; `seq` gives per sid the first and the last number, where that is known.
    """

    conn: str
    channel: str
    first: int
    last: int | None
    from_ns: int
    to_ns: int
    seq: dict[str, tuple[int, int]]

    @property
    def gap(self) -> GapOpened:
        """Return the gap that it is where nobody has the batches; all who find it name it alike."""
        return GapOpened(
            gap_id=f"gap-{self.conn}-archive-{self.channel}-{self.first}-{'end' if self.last is None else self.last}",
            cause=GapCause.ARCHIVE_DAMAGED,
            from_ns=self.from_ns,
            scope={
                "conn": self.conn,
                "channel": self.channel,
                "batches": [self.first, self.last],
                "seq": {sid: list(span) for sid, span in self.seq.items()},
            },
        )

    def overlaps(self, first: int, last: int | None) -> bool:
        """Say whether it has a batch in common with those from `first` to `last`."""
        return (last is None or self.first <= last) and (self.last is None or first <= self.last)


class _Run:
    """Batches that follow on one another, and what their headers say together."""

    __slots__ = ("first", "from_ns", "high", "last", "low", "n_last", "to_ns")

    def __init__(self, header: BatchHeader) -> None:
        self.first, self.last = header.span
        self.from_ns, self.to_ns, self.n_last = header.recv_first_ns, header.recv_last_ns, header.n_last
        self.low = {sid: low for sid, (low, _, _) in header.seq.items()}
        self.high = {sid: high for sid, (_, high, _) in header.seq.items()}

    def join(self, other: _Run) -> None:
        self.last, self.n_last = max(self.last, other.last), max(self.n_last, other.n_last)
        self.to_ns = max(self.to_ns, other.to_ns)
        self.low = {**other.low, **self.low}
        self.high = {**self.high, **other.high}


class Batches:
    """Takes note of a day's batches, by their headers: those that can be read, and those that are there and spoilt."""

    def __init__(self) -> None:
        self._whole: dict[Place, list[_Run]] = {}
        self._spoilt: dict[Place, list[_Run]] = {}

    def whole(self, header: BatchHeader) -> None:
        """Take note of a batch whose records are there."""
        runs = self._whole.setdefault((header.conn, header.channel), [])
        run = _Run(header)
        if runs and runs[-1].last + 1 == run.first:  # the usual case: a day of them takes no memory
            runs[-1].join(run)
        else:
            runs.append(run)

    def spoilt(self, header: BatchHeader) -> None:
        """Take note of a batch whose trailer is all that can be read."""
        self._spoilt.setdefault((header.conn, header.channel), []).append(_Run(header))

    def losses(
        self, stated: Mapping[str, Iterable[Interval]], spoilt_ends: Mapping[Place, int] | None = None
    ) -> tuple[Loss, ...]:
        """Return what is missing, by connection, channel and number.

        `stated`: the interval notes of each connection, which cover every record that it had, but for those at the end
        that were spoilt before they were noted; `spoilt_ends` are the last ordinals of these.
        """
        last_n = dict(spoilt_ends or {})
        for conn, intervals in stated.items():
            for interval in intervals:
                place = conn, interval.channel
                last_n[place] = max(interval.n_last, last_n.get(place, -1))
        for (conn, channel), runs in self._whole.items():
            if channel != SESSION and max(run.n_last for run in runs) > last_n.get((conn, channel), -1):
                last_n[conn, SESSION] = _UNENDED  # the notes about these are missing
        places = {*self._whole, *self._spoilt, *last_n}
        return tuple(loss for place in sorted(places) for loss in self._of(place, last_n.get(place, -1)))

    def _of(self, place: Place, last_n: int) -> list[Loss]:
        whole = _joined(self._whole.get(place, ()))
        spoilt = _joined(self._spoilt.get(place, ()))
        holes: list[tuple[int, int | None]] = []
        following = 0
        for run in whole:
            if run.first > following:
                holes.append((following, run.first - 1))
            following = run.last + 1
        reached = max((run.n_last for run in (*whole, *spoilt)), default=-1)
        if last_n > reached:
            holes.append((following, None))
        elif (last := max((run.last for run in spoilt), default=-1)) >= following:
            holes.append((following, last))
        return [self._loss(place, first, last, whole, spoilt) for first, last in holes]

    def _loss(self, place: Place, first: int, last: int | None, whole: list[_Run], spoilt: list[_Run]) -> Loss:
        conn, channel = place
        exact = next((run for run in spoilt if (run.first, run.last) == (first, last)), None)
        if exact is not None:
            from_ns, to_ns = exact.from_ns, exact.to_ns
            seq = {sid: (low, exact.high[sid]) for sid, low in exact.low.items()}
        else:
            from_ns, to_ns, seq = self._between(conn, first, last, whole)
        return Loss(conn=conn, channel=channel, first=first, last=last, from_ns=from_ns, to_ns=to_ns, seq=seq)

    def _between(
        self, conn: str, first: int, last: int | None, whole: list[_Run]
    ) -> tuple[int, int, dict[str, tuple[int, int]]]:
        """Return the time between a loss's neighbours, else the connection's beginning or end, and the numbers between."""
        alive = [
            run for (name, _), runs in (*self._whole.items(), *self._spoilt.items()) if name == conn for run in runs
        ]
        before = next((run for run in reversed(whole) if run.last < first), None)
        behind = next((run for run in whole if last is not None and run.first > last), None)
        from_ns = before.to_ns if before is not None else min((run.from_ns for run in alive), default=0)
        to_ns = behind.from_ns if behind is not None else max((run.to_ns for run in alive), default=from_ns)
        seq = {}
        if behind is not None:
            starts = {sid: before.high.get(sid, 0) + 1 if before is not None else 1 for sid in behind.low}
            seq = {sid: (start, behind.low[sid] - 1) for sid, start in starts.items() if start < behind.low[sid]}
        return from_ns, max(from_ns, to_ns), seq


def _joined(runs: Iterable[_Run]) -> list[_Run]:
    """Return runs in order, with neighbours put together; a repair may have put batches elsewhere in the archive."""
    joined: list[_Run] = []
    for run in sorted(runs, key=lambda run: (run.first, run.last)):
        if joined and run.first <= joined[-1].last + 1:
            joined[-1].join(run)
        else:
            joined.append(copy.copy(run))
    return joined
