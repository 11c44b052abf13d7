"""Which gaps of one socket the other socket of the same markets has filled (`connections: 2`). Pure.

Shards `a` and `b`, `a2` and `b2`, … record the same markets in processes of their own. A gap of one is healed where the other
recorded throughout, without a gap of its own about the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence

from ssmd_dagster.capture.gaps import Life
from ssmd_dagster.capture.spool import shard_of
from ssmd_dagster.day.causes import GapCause
from ssmd_dagster.day.events import Gap
from ssmd_dagster.day.payloads import GapClosed

MARGIN_NS = 1_000_000_000
"""What one socket misses, the other may miss a moment earlier or later: gaps this close count as the same time."""
_PARTNER = {"a": "b", "b": "a"}
_END_OF_TIME_NS = 2**63 - 1


def healed(gaps: Sequence[Gap], lives: Sequence[Life]) -> list[GapClosed]:
    """Return the ends of those gaps, open or staying, that the partner's connections have healed."""
    found = []
    for gap in gaps:
        shard = _shard(gap)
        # A frame that is too large meets every socket alike.
        if shard is None or gap.outcome not in ("open", "stays") or gap.cause == GapCause.OVERSIZED:
            continue
        partner = _PARTNER.get(shard[0], "") + shard[1:]
        to_ns = _covered_to(gap, [life for life in lives if shard_of(life.conn) == partner])
        if to_ns is not None and not any(_shard(other) == partner and _clashes(gap, to_ns, other) for other in gaps):
            found.append(GapClosed(gap_id=gap.gap_id, to_ns=to_ns, outcome="healed"))
    return found


def _shard(gap: Gap) -> str | None:
    if "conn" in gap.scope:
        return shard_of(str(gap.scope["conn"]))
    component = str(gap.scope.get("component", ""))
    return component.removeprefix("connector-") if component.startswith("connector-") else None


def _covered_to(gap: Gap, lives: Sequence[Life]) -> int | None:
    """Return where the gap ends if one life covers it; an open gap ends with a life that was told to stop."""
    for life in lives:
        to_ns = gap.to_ns if gap.to_ns is not None else life.stopped_ns
        if to_ns is not None and life.up_ns <= gap.from_ns <= to_ns <= life.end_ns:
            return to_ns
    return None


def _clashes(gap: Gap, to_ns: int, other: Gap) -> bool:
    channels = (gap.scope.get("channel"), other.scope.get("channel"))
    if None not in channels and channels[0] != channels[1]:
        return False
    other_to_ns = other.to_ns if other.to_ns is not None else _END_OF_TIME_NS
    return other.from_ns - MARGIN_NS <= to_ns and gap.from_ns <= other_to_ns + MARGIN_NS
