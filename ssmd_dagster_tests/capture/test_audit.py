"""After the audit a day's spool is finished, counted, declared and in the stream, and a second audit finds nothing to do."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ssmd_dagster.archive.batch import Batch, read_whole
from ssmd_dagster.archive.intervals import ends_session, torn_in
from ssmd_dagster.archive.records import parse_record
from ssmd_dagster.capture import audit as audit_module
from ssmd_dagster.capture.audit import (
    COMPONENT,
    audit,
    count_connection,
    finish_connection,
    lost_batches,
    republish,
    undeclared_holes,
)
from ssmd_dagster.capture.gaps import GapLog, gaps_between, noted_gaps
from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.capture.spool import SpoolWriter, read_spool, spooled_records
from ssmd_dagster.day.payloads import ChannelCount, GapOpened
from ssmd_dagster.environments.home import spool_dir
from ssmd_dagster.errors import SsmdError
from ssmd_dagster.exchange import SESSION
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster.stores.stream import BatchId, RawBatch
from ssmd_dagster_tests.capture.recordings import (
    DATE,
    Recording,
    a_recording,
    build_segments,
    header_of,
    read_segments,
    spooled_batches,
)

NOW_NS = 1_765_680_000_000_000_000
RECORDING = a_recording(frames=60)
WHOLE = b"".join(RECORDING.batches())
LINES = {
    record.n: line
    for flush in RECORDING.flushes
    for unsealed in flush
    for line in unsealed.block.splitlines()
    for record in (parse_record(line),)
}


def lines_of(path: Path) -> dict[int, bytes]:
    """Return every line of a spool file by its ordinal."""
    return {
        parse_record(line).n: line
        for batch, encoded in read_spool(path)
        for line in spooled_records(encoded, batch).splitlines()
    }


@settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=120
)
@example(cut=0, second_cut=0)
@example(cut=len(WHOLE), second_cut=0)
@example(cut=len(WHOLE) - 1, second_cut=3)
@given(cut=st.integers(0, len(WHOLE)), second_cut=st.integers(0, 2_000))
def test_a_file_cut_anywhere_is_finished_so_that_the_archive_adds_up(tmp_path: Path, cut: int, second_cut: int) -> None:
    """Every whole record is kept and in an interval, what a torn flush lost is declared; a second run changes nothing.

    Also where the audit itself is killed while it writes.
    """
    path = tmp_path / "812-a-0.batches"
    path.write_bytes(WHOLE[:cut])
    before = lines_of(path)
    noted = finish_connection(path, NOW_NS)
    finished = path.read_bytes()
    assert finish_connection(path, NOW_NS + 5) == 0
    assert path.read_bytes() == finished

    after = lines_of(path)
    assert {n: after[n] for n in before} == before == {n: LINES[n] for n in before}
    assert len(after) == len(before) + noted
    assert (noted == 0) == (not before or ends_session(before[max(before)]))
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir(exist_ok=True)
    readback = read_segments(build_segments(tmp_path / "first", spooled_batches(path)))
    assert readback.faults == ()
    assert readback.records == len(after)
    assert readback.received == readback.archived

    path.write_bytes(finished[: max(0, len(finished) - second_cut)])
    finish_connection(path, NOW_NS + 9)
    assert read_segments(build_segments(tmp_path / "second", spooled_batches(path))).faults == ()


def test_what_a_torn_flush_lost_is_declared_by_its_ordinals(tmp_path: Path) -> None:
    """A flush of which only the first channel's batch got in leaves holes, and a note says which."""
    recording = Recording()
    recording.begin()
    for seq in range(5):
        recording.frame("trade", seq=seq)
        recording.frame("ticker", seq=seq)
    recording.recorder.flush()
    path = recording.write(tmp_path)
    trades = next(encoded for encoded in recording.batches() if header_of(encoded).header.channel == "trade")
    session = recording.batches()[0]
    path.write_bytes(session + trades + b"torn")
    assert finish_connection(path, NOW_NS) == 3
    notes = [
        torn
        for batch, encoded in read_spool(path)
        if batch.header.channel == SESSION
        for torn in torn_in(spooled_records(encoded, batch))
    ]
    assert [torn.note()["n"] for torn in notes] == [[3, 9]]
    assert [torn.records for torn in notes] == [4]
    assert read_segments(build_segments(tmp_path, spooled_batches(path))).faults == ()


def test_a_spool_is_counted_from_its_headers(tmp_path: Path) -> None:
    """Records, batches, bytes and the last ordinal per channel, of whole batches only."""
    recording = a_recording()
    path = recording.write(tmp_path)
    counts = count_connection(path)
    assert {name: count.records for name, count in counts.items()} == recording.recorder.by_channel
    unsealed = [unsealed for flush in recording.flushes for unsealed in flush if unsealed.channel == "trade"]
    assert counts["trade"] == ChannelCount(
        records=sum(u.records for u in unsealed),
        batches=len(unsealed),
        bytes=sum(len(u.block) for u in unsealed),
        last_n=unsealed[-1].n_last,
    )
    assert max(count.last_n for count in counts.values()) == recording.recorder.n - 1
    path.write_bytes(path.read_bytes()[:-1])
    assert sum(c.batches for c in count_connection(path).values()) == sum(c.batches for c in counts.values()) - 1
    (tmp_path / "empty").touch()
    assert count_connection(tmp_path / "empty") == {}


async def publish(stores: Stores, *encoded: bytes) -> list[int]:
    """Publish batches as a connector does and return their sequences."""
    futures = [
        await stores.raw_stream.publish(
            data, date=DATE, channel=h.channel, conn=h.conn, batch=h.batch, records=h.records
        )
        for data in encoded
        for h in (header_of(data).header,)
    ]
    return list(await asyncio.gather(*futures))


def ids(*encoded: bytes) -> set[BatchId]:
    """Return the identities of encoded batches."""
    return {BatchId(h.conn, h.channel, h.batch) for data in encoded for h in (header_of(data).header,)}


async def test_exactly_what_the_stream_lacks_is_published(tmp_path: Path, stores: Stores) -> None:
    """Batches of several connections that the stream does not hold get there; those that it holds stay as they are."""
    recordings = [a_recording(f"812-a-{i}", env=stores.journal.stream.removesuffix("-day")) for i in range(2)]
    for recording in recordings:
        recording.write(tmp_path)
    batches = [data for recording in recordings for data in recording.batches()]
    await publish(stores, *batches[::3])
    last_seq = (await stores.js.stream_info(stores.raw_stream.stream)).state.last_seq
    assert (await republish(stores, tmp_path, DATE)).batches == len(batches) - len(batches[::3])
    async with stores.raw_stream.consume(DATE) as consumer:
        taken: list[RawBatch] = []
        while len(taken) < len(batches):
            fetched = await consumer.fetch(5)
            assert fetched
            taken += fetched
        assert await consumer.backlog() == 0
    assert sorted(message.data for message in taken) == sorted(batches)
    repaired = [message.data for message in taken if message.seq > last_seq]
    assert repaired == [data for i, data in enumerate(batches) if i % 3]
    assert (await republish(stores, tmp_path, DATE)).batches == 0


async def test_a_batch_that_is_lost_again_inside_the_duplicate_window_is_published_under_a_new_round(
    tmp_path: Path, stores: Stores
) -> None:
    """The stream refuses what it has seen under that name a moment ago; the audit looks again and takes the next name."""
    recording = a_recording()
    recording.write(tmp_path)
    batches = recording.batches()
    stream = stores.raw_stream.stream
    seqs = await publish(stores, *batches)
    await stores.js.delete_msg(stream, seqs[3])
    assert (await republish(stores, tmp_path, DATE)).batches == 1
    await stores.js.delete_msg(stream, (await stores.js.stream_info(stream)).state.last_seq)
    assert set(await stores.raw_stream.batches(DATE)) == ids(*batches) - ids(batches[3])
    assert (await republish(stores, tmp_path, DATE)).batches == 2
    assert set(await stores.raw_stream.batches(DATE)) == ids(*batches)


async def test_a_batch_that_no_message_takes_does_not_keep_the_others_back(tmp_path: Path, stores: Stores) -> None:
    """It stays in the spool; everything else is published."""
    recording = a_recording(frames=20)
    large = Recording("812-a-1")
    large.frame("trade", pad=random.Random(1).randbytes(9 << 20).hex())
    large.frame("ticker")
    large.recorder.flush()
    for each in (recording, large):
        each.write(tmp_path)
    small = [data for each in (recording, large) for data in each.batches() if len(data) < 8 << 20]
    assert len(small) == len(recording.batches()) + 1
    assert (await republish(stores, tmp_path, DATE)).batches == len(small)
    assert set(await stores.raw_stream.batches(DATE)) == ids(*small)


async def test_an_audit_finishes_declares_publishes_and_counts_and_a_second_one_does_nothing(
    setting: Setting, stores: Stores, book: DayBook
) -> None:
    """A lost connection, a crash without a successor just behind a hole, and batches that the stream lacks, all at once."""
    directory = spool_dir(setting.home, setting.env.name, DATE)
    env = setting.env.name
    lost = a_recording("3-a-0", env=env, end=False)
    lost.end(told=False)
    crashed = a_recording("3-a-1", env=env, end=False, clock=lost.clock)
    for seq in (1, 2, 5):
        crashed.frame("trade", sid=99, seq=seq)
    crashed.recorder.flush()
    for recording in (lost, crashed):
        recording.write(directory)
    await publish(stores, *lost.batches()[:5])

    await audit(setting, stores, DATE)
    day = await book.day(DATE)
    assert day is not None
    checkpoint = day.checkpoints[COMPONENT]
    assert checkpoint.final
    assert checkpoint.connections == {
        conn: count_connection(directory / f"{conn}.batches") for conn in ("3-a-0", "3-a-1")
    }
    frames = sum(len(recording.payloads) for recording in (lost, crashed))
    assert checkpoint.messages == frames
    spooled = spooled_batches(directory / "3-a-0.batches", directory / "3-a-1.batches")
    assert set(await stores.raw_stream.batches(DATE)) == ids(*spooled)
    assert [(gap.gap_id, gap.cause, gap.outcome) for gap in day.gaps] == [
        ("gap-3-a-1-99-2", "sequence_jump", "stays"),
        ("gap-3-a-0", "connection_lost", "stays"),
        ("gap-3-a-1", "process_crash", "open"),
    ]
    events = len(await stores.journal.read())
    files = {path: path.read_bytes() for path in directory.iterdir()}
    await audit(setting, stores, DATE)
    assert len(await stores.journal.read()) == events
    assert {path: path.read_bytes() for path in directory.iterdir()} == files


def spoil(path: Path, number: int) -> bytes:
    """Flip a bit in the records of a spool file's batch; return the batch as it was."""
    batch, encoded = list(read_spool(path))[number]
    content = bytearray(path.read_bytes())
    content[(batch.start + batch.data_end) // 2] ^= 1
    path.write_bytes(content)
    return encoded


@pytest.mark.parametrize("end", [False, True])
def test_whatever_a_disk_spoils_in_a_spool_the_rest_is_read(tmp_path: Path, end: bool) -> None:
    """The next connector begins, the audit goes through, and what is lost of a killed connection is declared."""
    recording = a_recording(frames=60, end=end)
    for number in range(len(recording.batches())):
        folder = tmp_path / str(number)
        path = recording.write(folder)
        spoil(path, number)
        assert GapLog(folder, "connector-a")._between is not None
        noted_gaps(folder)
        undeclared_holes(folder, "812-a-0")
        assert [lost.conn for lost in gaps_between(folder, "a", NOW_NS)] == ["812-a-0"]
        finish_connection(path, NOW_NS)
        finished = path.read_bytes()
        assert finish_connection(path, NOW_NS) == 0
        assert path.read_bytes() == finished
        if not end or number == len(recording.batches()) - 1:
            whole = [data for data in spooled_batches(path) if read_whole(data) is not None]
            faults = read_segments(build_segments(folder, whole)).faults
            assert not [fault for fault in faults if "ordinals" in fault], number


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize(
    ("numbers", "names"),
    [((1, 2), ["trade-1-2"]), ((3,), ["trade-3-end"]), ((0, 2, 3), ["trade-0-0", "trade-2-end"])],
)
def test_a_loss_is_declared_once_under_the_name_that_verification_gives_it(
    tmp_path: Path, end: bool, numbers: tuple[int, ...], names: list[str]
) -> None:
    """Neighbours together, the last ones of a killed connection too, and no hole of the numbers beside them."""
    recording = Recording("812-a-0")
    recording.begin()
    recording.recorder.flush()
    for number in range(4):
        for seq in range(5):
            recording.frame("trade", seq=5 * number + seq + 1)
        recording.recorder.flush()
    if end:
        recording.end()
    path = recording.write(tmp_path)
    there = [at for at, data in enumerate(recording.batches()) if header_of(data).header.channel == "trade"]
    for number in numbers:
        spoil(path, there[number])
    assert undeclared_holes(tmp_path, "812-a-0") == []
    assert (finish_connection(path, NOW_NS) == 0) == end
    whole, lost = [], []
    for batch, encoded in read_spool(path):
        if read_whole(encoded) is None:
            lost.append(batch.header)
        else:
            whole.append(encoded)
    wanted = [f"gap-812-a-0-archive-{name}" for name in names]
    losses = lost_batches(lost, {"812-a-0": count_connection(path)})
    assert [loss.gap.gap_id for loss in losses] == wanted
    assert losses[-1].seq == {"1": (5 * losses[-1].first + 1, 5 * numbers[-1] + 5)}
    assert (losses[-1].from_ns, losses[-1].to_ns) == (
        next(header.recv_first_ns for header in lost if header.batch == losses[-1].first),
        lost[-1].recv_last_ns,
    )
    found = read_segments(build_segments(tmp_path, whole)).losses
    assert [loss.gap.gap_id for loss in found] == wanted


def test_a_hole_that_the_connector_has_noted_is_not_declared_again(tmp_path: Path) -> None:
    """Under whatever name: only what it did not come to note is."""
    recording = Recording("812-a-0")
    recording.begin()
    for seq in (1, 2, 5, 6, 9):
        recording.frame("trade", seq=seq)
    recording.recorder.note({"event": "sequence_jump", "sid": 1, "seq": [2, 5], "numbering": 2})
    recording.recorder.flush()
    recording.write(tmp_path)
    assert {data.gap_id for _, data in undeclared_holes(tmp_path, "812-a-0")} == {"gap-812-a-0-1-6"}


async def test_what_a_disk_has_spoilt_is_put_back_from_the_stream_and_else_declared(
    setting: Setting, stores: Stores, book: DayBook
) -> None:
    """A spoilt batch is never published: it would pass for a copy."""
    directory, env = spool_dir(setting.home, setting.env.name, DATE), setting.env.name
    ended = a_recording("3-a-0", env=env)
    killed = a_recording("3-a-1", env=env, end=False, clock=ended.clock)
    there = [number for number, data in enumerate(killed.batches()) if header_of(data).header.channel == "trade"]
    session = [number for number, data in enumerate(ended.batches()) if header_of(data).header.channel == SESSION]
    paths = [recording.write(directory) for recording in (ended, killed)]
    lost = killed.batches()[there[-1]]
    await publish(stores, *ended.batches(), *(data for data in killed.batches() if data != lost))
    spoil(paths[0], session[-1])
    for number in (there[0], there[-1]):
        spoil(paths[1], number)

    await audit(setting, stores, DATE)
    assert paths[0].read_bytes() == b"".join(ended.batches())
    kept = [data for data in spooled_batches(paths[1]) if read_whole(data) is not None]
    assert kept[:-1] == [data for data in killed.batches() if data != lost]
    assert set(await stores.raw_stream.batches(DATE)) == ids(*ended.batches(), *kept)
    day = await book.day(DATE)
    assert day is not None
    header = header_of(lost).header
    (gap,) = [gap for gap in day.gaps if gap.cause == "archive_damaged"]
    assert gap.gap_id == f"gap-3-a-1-archive-trade-{header.batch}-end"
    assert (gap.from_ns, gap.to_ns, gap.outcome) == (header.recv_first_ns, header.recv_last_ns, "stays")
    events = len(await stores.journal.read())
    await audit(setting, stores, DATE)
    assert len(await stores.journal.read()) == events


async def test_a_connection_that_is_still_recorded_is_not_audited(
    setting: Setting, stores: Stores, book: DayBook
) -> None:
    """What it lacks yet would be written in its place, under ordinals that it gives out too."""
    directory = spool_dir(setting.home, setting.env.name, DATE)
    batches = a_recording("3-a-0", env=setting.env.name, end=False).batches()
    writer = SpoolWriter(directory, "3-a-0")
    writer.append(batches)
    with pytest.raises(SsmdError, match="still being recorded: 3-a-0"):
        await audit(setting, stores, DATE)
    assert writer.path.read_bytes() == b"".join(batches)
    writer.close()
    await audit(setting, stores, DATE)


async def test_a_day_without_a_spool_is_audited_as_empty(setting: Setting, stores: Stores, book: DayBook) -> None:
    """A day whose connector never got as far as a record has a checkpoint with nothing in it, and no gap."""
    await audit(setting, stores, DATE)
    day = await book.day(DATE)
    assert day is not None
    assert day.checkpoints[COMPONENT].connections == {}
    assert (day.checkpoints[COMPONENT].messages, day.gaps) == (0, ())


def test_the_times_of_all_holes_are_found_in_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day has millions of batches, and a connection may have hundreds of holes: each lies between its neighbours' times."""
    recording = Recording("812-a-0")
    recording.begin()
    times: dict[tuple[int, int], int] = {}
    for sid, seq in [(1, 1), (2, 1), (1, 4), (2, 2), (2, 5), (1, 5), (1, 8), (1, 12)]:
        recording.frame("trade", sid=sid, seq=seq)
        times[sid, seq] = recording.recorder.last_frame_ns or 0
        recording.recorder.flush()
    recording.write(tmp_path)
    passes: list[Path] = []

    def counted(path: Path) -> Iterator[tuple[Batch, bytes]]:
        passes.append(path)
        return read_spool(path)

    monkeypatch.setattr(audit_module, "read_spool", counted)
    found = {
        (data.gap_id, data.from_ns if isinstance(data, GapOpened) else data.to_ns)
        for _, data in undeclared_holes(tmp_path, "812-a-0")
    }
    expected = {"1-1": (1, 1, 1, 4), "1-5": (1, 5, 1, 8), "1-8": (1, 8, 1, 12), "2-2": (2, 2, 2, 5)}
    assert found == {
        (f"gap-812-a-0-{name}", times[place])
        for name, (sid, before, other, behind) in expected.items()
        for place in ((sid, before), (other, behind))
    }
    assert len(passes) == 2
