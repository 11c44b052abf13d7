"""The audit of a day's spool, on the connector's own host: publish what the stream lacks, count, tell the journal.

    python -m ssmd_dagster.capture.audit ENV DATE

Runs once after the connectors have stopped, whether they stopped by themselves or were killed. It compares the sets of
batches in spool and stream and publishes what is missing, writes the interval notes that a killed connector owes, and
appends a final `checkpoint` with the counts per connection and channel. Running it twice changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path

from ssmd_dagster.archive.batch import BatchHeader
from ssmd_dagster.archive.intervals import Interval, IntervalCheck, interval_of, intervals_in
from ssmd_dagster.archive.records import note_line, parse_record
from ssmd_dagster.capture.process import connected, run
from ssmd_dagster.capture.recorder import Origin, Unsealed, seal
from ssmd_dagster.capture.setting import Setting, load_setting
from ssmd_dagster.capture.spool import append_to_spool, read_spool, spool_path, spooled_connections, spooled_records
from ssmd_dagster.day.payloads import ChannelCount, Checkpoint
from ssmd_dagster.day.states import EventName
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import ExitCode
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook

COMPONENT = "spool"

_log = logging.getLogger(__name__)


def count_connection(path: Path) -> dict[str, ChannelCount]:
    """Count a spool file by channel, from the headers of its whole batches."""
    channels: dict[str, ChannelCount] = {}
    for batch, _encoded in read_spool(path):
        header = batch.header
        known = channels.get(header.channel)
        channels[header.channel] = ChannelCount(
            records=header.records + (known.records if known else 0),
            batches=1 + (known.batches if known else 0),
            bytes=header.bytes + (known.bytes if known else 0),
            last_n=header.n_last,
        )
    return channels


def finish_connection(path: Path, now_ns: int) -> int:
    """Append the interval notes that a connection's recorder did not come to write; return how many there were.

    A torn tail is cut off first. The connection's last record is then, as always, the note about `session`.
    """
    stated: list[Interval] = []
    headers: dict[str, BatchHeader] = {}
    last_session = b""
    end, last_n = 0, -1
    for batch, encoded in read_spool(path):
        header = batch.header
        headers[header.channel] = header
        last_n, end = max(last_n, header.n_last), batch.end
        if header.channel == SESSION:
            last_session = spooled_records(encoded, batch)
            stated.extend(intervals_in(last_session))
    if last_n < 0 or _is_finished(last_session, last_n):
        return 0
    checks = {channel: IntervalCheck(channel, stated) for channel in headers}
    for batch, encoded in read_spool(path):
        header = batch.header
        checks[header.channel].feed(spooled_records(encoded, batch), header.n_first, header.n_last)
    owed = [
        interval for check in checks.values() if check.channel != SESSION and (interval := check.finish()) is not None
    ]
    template = next(iter(headers.values()))
    origin = Origin(env=template.env, day=template.day, epoch=template.epoch, conn=template.conn)
    session = checks.get(SESSION) or IntervalCheck(SESSION, ())
    lines: list[bytes] = []
    for interval in owed:
        last_n += 1
        lines.append(note_line(last_n, now_ns, interval.note()))
    if lines:
        session.feed(b"".join(lines), last_n - len(lines) + 1, last_n)
    remainder = session.finish()
    if remainder is not None:
        last_n += 1
        lines.append(note_line(last_n, now_ns, remainder.note()))
    known = headers.get(SESSION)
    append_to_spool(
        path,
        end,
        seal(
            origin,
            Unsealed(
                channel=SESSION,
                batch=known.batch + 1 if known else 0,
                records=len(lines),
                n_first=last_n - len(lines) + 1,
                n_last=last_n,
                recv_first_ns=now_ns,
                recv_last_ns=now_ns,
                seqs={},
                block=b"".join(lines),
            ),
        ),
    )
    return len(lines)


def _is_finished(session_records: bytes, last_n: int) -> bool:
    """Tell whether the connection's last record is the interval note about `session` itself."""
    if not session_records:
        return False
    last = parse_record(session_records.splitlines()[-1])
    interval = interval_of(last.note)
    return last.n == last_n and interval is not None and interval.channel == SESSION


async def republish(stores: Stores, directory: Path, date: str) -> int:
    """Publish every spooled batch that the stream lacks and return how many there were."""
    in_stream = await stores.raw_stream.batches(date)
    missing = 0
    for conn in spooled_connections(directory):
        for batch, encoded in read_spool(spool_path(directory, conn)):
            header = batch.header
            if (conn, header.channel, header.batch) in in_stream:
                continue
            acknowledged = await stores.raw_stream.publish(
                encoded,
                date=date,
                channel=header.channel,
                conn=conn,
                batch=header.batch,
                records=header.records,
                repair_round=1,
            )
            await acknowledged
            missing += 1
    return missing


async def main(env_name: str, date: str, stop: asyncio.Event) -> None:
    """Audit the spool of one day."""
    setting = load_setting(env_name)
    async with connected(setting, COMPONENT) as stores:
        await audit(setting, stores, date)


async def audit(setting: Setting, stores: Stores, date: str) -> None:
    """Repair the stream from the spool and append the final checkpoint."""
    directory = spool_dir(setting.home, setting.env.name, date)
    for conn in spooled_connections(directory):
        owed = finish_connection(spool_path(directory, conn), setting.clock())
        if owed:
            _log.warning("wrote %d interval notes that %s did not come to write", owed, conn)
    repaired = await republish(stores, directory, date)
    if repaired:
        _log.warning("published %d batches that the stream lacked", repaired)
    counts = {conn: count_connection(spool_path(directory, conn)) for conn in spooled_connections(directory)}
    messages = sum(c.records for channels in counts.values() for name, c in channels.items() if name != SESSION)
    checkpoint = Checkpoint(
        component=COMPONENT,
        final=True,
        connections=counts,
        messages=messages,
        bytes=sum(c.bytes for channels in counts.values() for c in channels.values()),
    )
    book = DayBook(setting.env.name, stores.journal, stores.cache, setting.clock, f"capture:{COMPONENT}")
    day = await book.day(date)
    if day is not None and day.checkpoints.get(COMPONENT) == checkpoint:
        return
    await book.append(date, EventName.CHECKPOINT, data=checkpoint)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(int(ExitCode.USAGE))
    run(lambda stop: main(sys.argv[1], sys.argv[2], stop))
