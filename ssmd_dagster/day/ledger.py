"""The day's balance sheet of records: its lines, what they must equal, and every difference by name and size.

Per channel `received = spooled = published = archived` and `archived = normalised + duplicates + control + rejected +
other_day + opening_fold`; the wire's own count, the exchange's list of trades and the order books stand beside it. A line that
nobody has drawn up is None ("not computed"), never 0, and `why_not` says why where that is known. Counting is the work of
`workflows/verify`, judging that of `condition`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec


class Line(NamedTuple):
    """One printed line of the ledger; `size` is None where it was not computed."""

    name: str
    size: int | None


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """A gap that accounts for a difference; `size` None accounts for a loss of any size, never for a surplus."""

    difference: str
    gap_id: str
    size: int | None = None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """Two sides that should be equal and are not: `size` is left minus right, so positive is a loss on the way.

    `explained_by` lists the gaps that account for it; empty means that nothing (or not enough) does.
    """

    name: str
    size: int
    explained_by: tuple[str, ...] = ()

    @property
    def explained(self) -> bool:
        """Say whether gaps account for the whole difference."""
        return bool(self.explained_by)


class ChannelLedger(msgspec.Struct, frozen=True, kw_only=True):
    """Records of one channel, each line None where it was not computed. `rejected` is per reason."""

    channel: str
    received: int | None = None
    spooled: int | None = None
    published: int | None = None
    archived: int | None = None
    normalised: int | None = None
    duplicates: int | None = None
    control: int | None = None
    rejected: dict[str, int] | None = None
    other_day: int | None = None
    opening_fold: int | None = None

    @property
    def rejected_total(self) -> int | None:
        """Return the rejected records of all reasons."""
        return None if self.rejected is None else sum(self.rejected.values())

    def lines(self) -> list[Line]:
        """Return the channel's lines in the order of the pipeline."""
        return [
            Line("received", self.received),
            Line("spooled", self.spooled),
            Line("published", self.published),
            Line("archived", self.archived),
            Line("normalised", self.normalised),
            Line("duplicates", self.duplicates),
            Line("control", self.control),
            Line("rejected", self.rejected_total),
            Line("other_day", self.other_day),
            Line("opening_fold", self.opening_fold),
        ]


class WireLedger(msgspec.Struct, frozen=True, kw_only=True):
    """The exchange's own numbering: distinct sequence numbers over all connections and sids, holes and duplicates."""

    distinct: int | None = None
    holes: int | None = None
    duplicates: int | None = None


class TradesLedger(msgspec.Struct, frozen=True, kw_only=True):
    """The exchange's list of trades against ours, by trade id: `exchange = captured + repaired + missing`."""

    exchange: int | None = None
    captured: int | None = None
    repaired: int | None = None
    missing: int | None = None
    extra: int | None = None


class BooksLedger(msgspec.Struct, frozen=True, kw_only=True):
    """Order books folded from deltas against later snapshots: `points` comparisons over `markets`, `differing` not equal."""

    points: int | None = None
    differing: int | None = None
    markets: int | None = None


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """The whole sheet: channels in a fixed order, the wire, the trades, the books, and what gaps account for.

    `why_not` says of a part or a line that is not computed why that is so: `trades`, `normalised`.
    """

    channels: tuple[ChannelLedger, ...] = ()
    wire: WireLedger = WireLedger()
    trades: TradesLedger = TradesLedger()
    books: BooksLedger = BooksLedger()
    explanations: tuple[Explanation, ...] = ()
    why_not: dict[str, str] = {}

    def lines(self) -> list[Line]:
        """Return all lines, named `trade received`, `wire holes`, `trades exchange` and so on."""
        lines = [Line(f"{sheet.channel} {line.name}", line.size) for sheet in self.channels for line in sheet.lines()]
        for part, sheet in self._parts():
            lines += [Line(f"{part} {name}", count) for name, count in _fields(sheet)]
        return lines

    def _parts(self) -> list[tuple[str, msgspec.Struct]]:
        return [("wire", self.wire), ("trades", self.trades), ("books", self.books)]

    def not_computed(self) -> list[str]:
        """Return the names of the lines that nobody has drawn up."""
        return [line.name for line in self.lines() if line.size is None]

    def not_computed_briefly(self) -> list[str]:
        """Return the same for a reader: a line missing in every channel is named once, a part without any line as a whole.

        Each with the reason, where there is one.
        """
        missing = set(self.not_computed())
        brief: list[str] = []
        for line in ChannelLedger(channel="").lines():
            channels = [sheet.channel for sheet in self.channels if f"{sheet.channel} {line.name}" in missing]
            everywhere = channels and len(channels) == len(self.channels)
            brief += [line.name] if everywhere else [f"{channel} {line.name}" for channel in channels]
        for part, sheet in self._parts():
            names = [f"{part} {name}" for name, _ in _fields(sheet)]
            lines = [name for name in names if name in missing]
            brief += [part] if len(lines) == len(names) else lines
        return [f"{name} ({self.why_not[name]})" if name in self.why_not else name for name in brief]

    def differences(self) -> list[Difference]:
        """Return every pair of sides that are both computed and not equal, in the order of the lines."""
        return [self._difference(name, size) for name, size in self._balances() if size]

    def unexplained(self) -> list[Difference]:
        """Return the differences that no gap accounts for."""
        return [difference for difference in self.differences() if not difference.explained]

    def to_json(self) -> dict[str, Any]:
        """Return the sheet as plain JSON for events and manifests."""
        plain: dict[str, Any] = msgspec.to_builtins(self)
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Ledger:
        """Read what `to_json` wrote; unknown keys are ignored.

        Raises:
            msgspec.ValidationError: Not such a sheet.
        """
        return msgspec.convert(plain, cls)

    def _balances(self) -> list[tuple[str, int]]:
        balances: list[tuple[str, int]] = []

        def balance(name: str, left: int | None, right: int | None) -> None:
            if left is not None and right is not None:
                balances.append((name, left - right))

        for sheet in self.channels:
            balance(f"{sheet.channel}: received - spooled", sheet.received, sheet.spooled)
            balance(f"{sheet.channel}: spooled - published", sheet.spooled, sheet.published)
            balance(f"{sheet.channel}: published - archived", sheet.published, sheet.archived)
            filed = _total(
                sheet.normalised,
                sheet.duplicates,
                sheet.control,
                sheet.rejected_total,
                sheet.other_day,
                sheet.opening_fold,
            )
            balance(f"{sheet.channel}: archived - filed", sheet.archived, filed)
        balance("wire: holes", self.wire.holes, 0)
        trades = self.trades
        listed = _total(trades.captured, trades.repaired, trades.missing)
        balance("trades: exchange - listed", trades.exchange, listed)
        balance("trades: missing", trades.missing, 0)
        balance("books: differing", self.books.differing, 0)
        return balances

    def _difference(self, name: str, size: int) -> Difference:
        fitting = [entry for entry in self.explanations if entry.difference == name]
        any_size = size > 0 and any(entry.size is None for entry in fitting)
        exact = bool(fitting) and sum(entry.size or 0 for entry in fitting) == size
        gap_ids = tuple(entry.gap_id for entry in fitting) if any_size or exact else ()
        return Difference(name=name, size=size, explained_by=gap_ids)


def _fields(sheet: msgspec.Struct) -> list[tuple[str, int | None]]:
    return [(name, getattr(sheet, name)) for name in sheet.__struct_fields__]


def _total(*counts: int | None) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
