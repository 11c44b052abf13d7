"""The sequence numbers of one connection: what is missing, what came twice, what came late. Pure.

The exchange numbers the frames of each subscription (sid) from 1 without a hole, whatever their channel: answers, errors and
snapshots too. Whoever feeds this gives every number of a sid that came, in order of arrival. Not here: what a hole
means for a book, and telling anybody.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from typing import NamedTuple

from ssmd_dagster.archive.numbering import MAX_HOLE

GRACE_LOOKS = 2
"""How often `due` is asked before a hole counts as one: neighbours that came in the wrong order are none."""
NEW_NUMBERS = 100
"""So many ascending numbers in a row that do not belong here, come before or far above, are a numbering that began anew."""
MAX_HOLES = 1_000
"""Holes of one sid that can still be filled; of older ones it is not known any more which numbers were missing."""


def gap_id_of(conn: str, sid: int, first: int, numbering: int = 0) -> str:
    """Return the id of the gap about the numbers of a subscription that are missing from `first` on.

    `numbering`: how often they had begun anew.
    """
    return f"gap-{conn}-{sid}-{first - 1}" + (f"-{numbering}" if numbering else "")


class Arrival(NamedTuple):
    """One frame's number and receive time."""

    seq: int
    recv_ns: int


class Hole:
    """Numbers `first` to `last` did not come between two frames, received at `from_ns` and `to_ns`.

    `numbering` counts how often the sid's numbers had begun anew: the same ones may be missing again.
    """

    __slots__ = ("declared", "filled", "first", "from_ns", "last", "looks", "numbering", "sid", "to_ns")

    def __init__(self, sid: int, first: int, last: int, from_ns: int, to_ns: int, numbering: int) -> None:
        self.sid, self.first, self.last, self.from_ns, self.to_ns = sid, first, last, from_ns, to_ns
        self.numbering = numbering
        self.filled: set[int] = set()
        self.looks = 0
        self.declared = False

    def __lt__(self, other: Hole) -> bool:
        return self.first < other.first

    @property
    def size(self) -> int:
        """Return how many numbers did not come in their place."""
        return self.last - self.first + 1


class _Sid:
    __slots__ = (
        "early",
        "expected",
        "first",
        "first_ns",
        "holes",
        "last_ns",
        "next",
        "stray_first",
        "stray_last",
        "stray_ns",
        "strays",
    )

    def __init__(self, first: int, now_ns: int, *, expected: bool = False) -> None:
        self.expected = expected
        self.first = self.next = first
        self.first_ns = now_ns
        self.early: set[int] = set()
        self.last_ns = now_ns
        self.holes: list[Hole] = []
        self.strays = self.stray_first = self.stray_last = self.stray_ns = 0


class Sequences:
    """All sids of one connection. The counts are of frames.

    `missing` counts the numbers of declared holes, `duplicates` frames whose number had come, `reordered` frames that filled
    a hole before it was declared, `healed` those that filled a declared one.
    """

    def __init__(self) -> None:
        self.missing = 0
        self.duplicates = 0
        self.reordered = 0
        self.healed = 0
        self._sids: dict[int, _Sid] = {}
        self._numberings: dict[int, int] = {}
        self._young: list[Hole] = []
        self._healed: list[Hole] = []

    def expect(self, sid: int, now_ns: int) -> None:
        """Say that a subscription has begun, at `now_ns` or later: its first number is 1, whatever has come by now."""
        state = self._sids.get(sid)
        if state is None or state.first - 1 > MAX_HOLE:
            self._sids[sid] = _Sid(1, now_ns, expected=True)
        elif not state.expected:
            state.expected = True
            if state.first > 1:
                hole = self._hole(sid, 1, state.first - 1, min(now_ns, state.first_ns), state.first_ns)
                hole.filled = state.early
                self.reordered += len(hole.filled)
                if len(hole.filled) < hole.size:
                    self._open(state, hole)

    def _hole(self, sid: int, first: int, last: int, from_ns: int, to_ns: int) -> Hole:
        return Hole(sid, first, last, from_ns, max(from_ns, to_ns), self._numberings.get(sid, 0))

    def _open(self, state: _Sid, hole: Hole) -> None:
        insort(state.holes, hole)
        del state.holes[:-MAX_HOLES]
        self._young.append(hole)

    def forget(self, sid: int) -> int | None:
        """Say that a subscription is over; its number may be used again. Return when its last frame came, or it began."""
        state = self._sids.pop(sid, None)
        self._young = [hole for hole in self._young if hole.sid != sid]
        if state is None:
            return None
        self._numberings[sid] = self._numberings.get(sid, 0) + 1
        return state.last_ns

    def in_order(self, sid: int, seqs: list[int], last_ns: int) -> bool:
        """Take numbers that follow on one another and on those before; False, and nothing is taken, if they do not."""
        state = self._sids.get(sid)
        first = seqs[0]
        if state is None:
            state = self._sids[sid] = _Sid(first, last_ns)
        if first != state.next or seqs != list(range(first, first + len(seqs))):
            return False
        state.next = first + len(seqs)
        state.last_ns = last_ns
        state.strays = 0
        return True

    def feed(self, sid: int, arrivals: Iterable[Arrival]) -> None:
        """Take numbers in whatever order they came."""
        state = self._sids.get(sid)
        for seq, recv_ns in arrivals:
            if state is None:
                state = self._sids[sid] = _Sid(seq, recv_ns)
            if seq == state.next:
                state.next = seq + 1
            elif state.next < seq <= state.next + MAX_HOLE:
                self._open(state, self._hole(sid, state.next, seq - 1, state.last_ns, recv_ns))
                state.next = seq + 1
            elif seq > state.next or not self._late(state, seq):
                if self._is_anew(state, seq, recv_ns):
                    # Nobody knows what came in between; the numbers that told of it are the hole.
                    self._young.append(self._strayed(sid, state))
                    self._numberings[sid] = self._numberings.get(sid, 0) + 1
                    state = self._sids[sid] = _Sid(seq + 1, recv_ns, expected=True)
                continue
            state.last_ns = recv_ns
            state.strays = 0

    def _strayed(self, sid: int, state: _Sid) -> Hole:
        hole = self._hole(sid, state.stray_first, state.stray_last, state.last_ns, state.stray_ns)
        hole.numbering += 1
        return hole

    def _is_anew(self, state: _Sid, seq: int, recv_ns: int) -> bool:
        """Take note of a number that does not belong here; tell whether the exchange has begun to number anew."""
        if not state.strays or not state.stray_last < seq <= state.stray_last + MAX_HOLE:
            state.strays, state.stray_first = 0, seq
        state.strays += 1
        state.stray_last, state.stray_ns = seq, recv_ns
        return state.strays >= NEW_NUMBERS

    def _late(self, state: _Sid, seq: int) -> bool:
        """Take a number that should have come before; False if it had."""
        if not state.expected and 1 <= seq < state.first and seq not in state.early:
            state.early.add(seq)
            return True
        index = bisect_right(state.holes, seq, key=lambda hole: hole.first) - 1
        hole = state.holes[index] if index >= 0 else None
        if hole is None or seq > hole.last or seq in hole.filled:
            self.duplicates += 1
            return False
        hole.filled.add(seq)
        if hole.declared:
            self.healed += 1
        else:
            self.reordered += 1
        if len(hole.filled) == hole.size:
            del state.holes[index]
            if hole.declared:
                self._healed.append(hole)
            else:
                self._young.remove(hole)
        return True

    def due(self, *, at_once: bool = False) -> list[Hole]:
        """Return the holes that count from now on: those that `GRACE_LOOKS` looks did not see filled, or all `at_once`.

        `at_once`, also numbers far above that are too few to be a new numbering yet, where any is missing among them.
        """
        if at_once:
            self._young += [
                self._strayed(sid, state)
                for sid, state in self._sids.items()
                if state.stray_first > state.next and 0 < state.strays <= state.stray_last - state.stray_first
            ]
        if not self._young:
            return []
        due: list[Hole] = []
        young: list[Hole] = []
        for hole in self._young:
            hole.looks += 1
            (due if at_once or hole.looks >= GRACE_LOOKS else young).append(hole)
        self._young = young
        for hole in due:
            hole.declared = True
            self.missing += hole.size - len(hole.filled)
        return due

    def healed_holes(self) -> list[Hole]:
        """Return, once, the declared holes whose every number has come after all."""
        healed, self._healed = self._healed, []
        return healed
