"""What the exchange sends that no reader knows: unknown keys, message types and shapes, counted with an example each.

Not for what is done about it: rows are read all the same where they can be, and raw keeps everything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import msgspec

from ssmd_dagster.day.payloads import DriftCount, DriftFound

MOST = 5
"""So many fingerprints of each kind, the most frequent ones, are journaled with a day's seal."""

DriftKind = Literal["key", "type", "shape"]

MAX_FINGERPRINTS = 1_000
"""Further fingerprints are counted together under `MORE`; an exchange that sends random keys fills no memory."""
MORE = "…"
_EXAMPLE_CHARS = 500


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """One fingerprint: `trade.msg.new_key` (a key, with its JSON type), a message type, or why a shape cannot be read."""

    kind: DriftKind
    name: str
    json_type: str = ""
    count: int
    example: str


class DriftLog:
    """Counts fingerprints; the first example of each is kept, cut at 500 characters."""

    def __init__(self) -> None:
        self._counts: dict[tuple[DriftKind, str, str], int] = {}
        self._examples: dict[tuple[DriftKind, str, str], str] = {}

    def add(self, kind: DriftKind, name: str, json_type: str, count: int, example: bytes | str) -> None:
        """Count something `count` times."""
        key = (kind, name, json_type)
        if key not in self._counts:
            if len(self._counts) >= MAX_FINGERPRINTS:
                key = (kind, MORE, "")
            text = example if isinstance(example, str) else example[: 4 * _EXAMPLE_CHARS].decode("utf-8", "replace")
            self._examples.setdefault(key, text[:_EXAMPLE_CHARS].rstrip("\n"))
        self._counts[key] = self._counts.get(key, 0) + count

    def merge(self, found: Iterable[Drift]) -> None:
        """Take over what another log has counted."""
        for one in found:
            self.add(one.kind, one.name, one.json_type, one.count, one.example)

    def found(self) -> tuple[Drift, ...]:
        """Return all fingerprints, sorted."""
        return tuple(
            Drift(kind=kind, name=name, json_type=json_type, count=count, example=self._examples[kind, name, json_type])
            for (kind, name, json_type), count in sorted(self._counts.items())
        )


def briefly(found: Sequence[Drift]) -> DriftFound:
    """Return what is journaled of it: how many fingerprints, and the most frequent ones of each kind without their examples."""
    ordered = sorted(found, key=lambda one: -one.count)
    most = [one for kind in get_args(DriftKind) for one in [one for one in ordered if one.kind == kind][:MOST]]
    return DriftFound(
        fingerprints=len(found),
        most=tuple(DriftCount(kind=o.kind, name=o.name, json_type=o.json_type, count=o.count) for o in most),
    )
