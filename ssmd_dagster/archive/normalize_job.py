"""What the normaliser is told and what it answers: its job and its result, which go from process to process as files.

Not here: the work (`normalize`), and where segments come from and tables go to (`workflows.normalize`).
"""

from __future__ import annotations

import msgspec

from ssmd_dagster.archive.drift import Drift
from ssmd_dagster.archive.figures import Figures
from ssmd_dagster.day.events import Gap
from ssmd_dagster.exchange import Market


class RawSegment(msgspec.Struct, frozen=True, kw_only=True):
    """One local file of batches: a segment, or (`channel` empty) a spool with batches of all channels."""

    channel: str
    path: str


class Neighbour(msgspec.Struct, frozen=True, kw_only=True):
    """The day before or after: its window, its segments that may overlap, and when its revisions were sealed.

    `late_until_ns` is set where it is known to have received rows of the day long after: until when it did. `recorded_on`
    says of the day before that nothing else was recorded of this day at first: its roll was late, or the day was missed. Its
    connections that were still up count as the day's own then. `gaps` are that day's.
    """

    date: str
    open_ns: int
    close_ns: int
    segments: tuple[RawSegment, ...] = ()
    seals: tuple[int, ...] = ()
    late_until_ns: int | None = None
    recorded_on: bool = False
    gaps: tuple[Gap, ...] = ()


class NormalizeJob(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that the tables of a day are made of. `seals`: when the day's revisions were sealed.

    `channels` are those that the day was to record, `markets` the security master as it is known, `source` what is said of
    rows off the socket (`archive` where an archive is replayed), `capnp_schema` the file of the trades' schema if Cap'n Proto
    files are wanted. Tables are written into the folder `output`, which is made.
    """

    feed: str
    env: str
    date: str
    open_ns: int
    close_ns: int
    output: str
    segments: tuple[RawSegment, ...]
    revision: int = 1
    neighbours: tuple[Neighbour, ...] = ()
    gaps: tuple[Gap, ...] = ()
    channels: tuple[str, ...] = ()
    markets: tuple[Market, ...] = ()
    seals: tuple[int, ...] = ()
    source: str = "live"
    capnp_schema: str | None = None


class TableFile(msgspec.Struct, frozen=True, kw_only=True):
    """One written file; `ticker` is set for the Cap'n Proto file of one market."""

    table: str
    path: str
    rows: int
    size: int
    sha256: str
    ticker: str | None = None


class ChannelFiling(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a channel's archived records; the lines add up to `archived`. `rejected` is by reason."""

    archived: int = 0
    normalised: int = 0
    duplicates: int = 0
    control: int = 0
    rejected: dict[str, int] = {}
    other_day: int = 0
    opening_fold: int = 0

    @property
    def balances(self) -> bool:
        """Say whether every record is accounted for."""
        filed = self.normalised + self.duplicates + self.control + self.other_day + self.opening_fold
        return self.archived == filed + sum(self.rejected.values())


class LateElsewhere(msgspec.Struct, frozen=True):
    """Rows of a neighbouring day that came after its seal; `until_ns`: when the last of them was received."""

    rows: int
    until_ns: int


class NormalizeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The tables of a day and the account of its records.

    `filings` are by raw channel, of the day's own records; `from_neighbours` counts rows by table that only the neighbouring
    days' raw files have. `damaged` names batches that could not be read (their records count as not archived). `late` counts
    rows off a socket that came after a seal of the day, `late_elsewhere` per neighbouring date those of its rows that came
    after its own. `figures` are what the day's pictures are drawn from, without the coverage, which is a table.
    """

    files: tuple[TableFile, ...]
    filings: dict[str, ChannelFiling]
    from_neighbours: dict[str, int]
    drift: tuple[Drift, ...]
    damaged: tuple[str, ...]
    late: int
    late_elsewhere: dict[str, LateElsewhere]
    figures: Figures | None = None
