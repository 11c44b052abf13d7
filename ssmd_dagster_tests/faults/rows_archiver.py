"""Rows A1 to A10: the archiver, its disk and the object store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

from ssmd_dagster.archive.batch import Batch, scan
from ssmd_dagster.capture.control import control_subject, request
from ssmd_dagster.errors import UnreachableError
from ssmd_dagster.stores.connect import Stores
from ssmd_dagster_tests.faults.scenario import SkippedError, scenario
from ssmd_dagster_tests.faults.stage import DONE, ENV, NS, Stage, small_disk

CRASH_POINTS = (
    "archiver.append.before",
    "archiver.append.after",
    "archiver.close.before",
    "archiver.close.after",
    "objects.create.written",
    "objects.create.linked",
    "archiver.put.after",
    "archiver.stored.before",
    "archiver.stored.after",
)
ARCHIVER = "capture.archiver"


def ask_to_flush(stage: Stage) -> None:
    """Have the archiver store what it has; an answer that does not come is as good as one that does."""

    async def ask(stores: Stores) -> None:
        try:
            await request(stores.nc, control_subject(ENV, "archiver", stage.date), "flush")
        except UnreachableError as error:
            stage.notes["flush"] = str(error)

    stage.with_stores(ask)


def flushed(stage: Stage, timeout_s: float = 90.0) -> None:
    """Wait until the archiver says itself that it has stored what it was asked to."""

    async def wait(stores: Stores) -> None:
        subject = control_subject(ENV, "archiver", stage.date)
        async with asyncio.timeout(timeout_s):
            while True:
                with contextlib.suppress(UnreachableError):  # it is being started again
                    status = await request(stores.nc, subject, "status")
                    if status["state"] == "archiving" and not status["flushing"]:
                        return
                await asyncio.sleep(0.1)

    stage.with_stores(wait)


def in_error(stage: Stage, words: str, timeout_s: float = 60.0) -> None:
    """Wait until the archiver stands still with these words, and see that the day's status shows them as ERROR."""
    stage.wait(
        lambda: stage.beat("archiver").get("state") == "error" and words in str(stage.beat("archiver")["error"]),
        f"the archiver to say {words!r}",
        timeout_s,
    )
    status = stage.house.json("day", "status", ENV)
    assert status["state"] == "ERROR", status["state"]
    assert words in status["error"]


@scenario("A1", "kill -9 at each of nine points of storing a segment", "every batch once")
def archiver_crashes(stage: Stage) -> None:
    """In an order drawn by lot, one death at each point, in one day."""
    for point in stage.random.sample(CRASH_POINTS, len(CRASH_POINTS)):
        before = stage.pid(ARCHIVER)
        stage.crash_at(point)
        ask_to_flush(stage)
        stage.wait(stage.crashed, f"the archiver to reach {point}")
        since = time.monotonic()
        stage.wait(lambda before=before: stage.pid(ARCHIVER) not in (None, before), "another archiver")  # type: ignore[misc]
        stage.wait(
            lambda before=before: (  # type: ignore[misc]
                stage.beat("archiver").get("state") == "archiving" and stage.beat("archiver").get("pid") != before
            ),
            "the archiver to archive again",
        )
        stage.rto_s = max(stage.rto_s or 0.0, round(time.monotonic() - since, 2))
    stage.notes["points"] = len(CRASH_POINTS)


@scenario("A1", "kill -9 at random moments", "every batch once")
def archiver_killed(stage: Stage) -> None:
    """Six deaths, with flushes in between."""
    for _ in range(6):
        if stage.random.random() < 0.5:
            ask_to_flush(stage)
        stage.pause(1.1, 2.5)
        since = time.monotonic()
        stage.kill(ARCHIVER)
        stage.recovered(since)


def _on_small_disk(stage: Stage, folder: Path, size: str) -> Path:
    """Put a small file system over a folder for the rest of the run; return the file that can fill it."""
    try:
        stage.enter(small_disk(folder, size))
    except PermissionError as error:
        raise SkippedError(str(error)) from error
    return folder / ".ballast"


def _fill(ballast: Path) -> None:
    with contextlib.suppress(OSError):  # it is full then, which is what is wanted
        ballast.write_bytes(bytes(64 << 20))


@scenario(
    "A2",
    "the archiver's disk is full",
    "ERROR with the cause, no partial batch; goes on when there is room",
)
def local_disk_full(stage: Stage) -> None:
    """A small file system over the segments' folder, filled and emptied again."""
    ballast = _on_small_disk(stage, stage.house.home / "segments" / ENV, "3m")
    since = time.monotonic()
    _fill(ballast)
    stage.kill(ARCHIVER)
    in_error(stage, "No space left on device")
    stage.detected(since)
    since = time.monotonic()
    ballast.unlink()
    stage.recovered(since)


@scenario(
    "A2",
    "the object store's disk is full",
    "ERROR with the cause, no partial object; goes on when there is room",
    started=False,
)
def store_disk_full(stage: Stage) -> None:
    """The store's folder is a small file system; what it refuses is put again when there is room."""
    ballast = _on_small_disk(stage, stage.house.home / "objects" / "raw", "8m")
    stage.start()
    since = time.monotonic()
    _fill(ballast)
    ask_to_flush(stage)
    in_error(stage, "No space left on device")
    stage.detected(since)
    assert list(stage.archive_folder().glob("*.zst")) == []
    since = time.monotonic()
    ballast.unlink()
    flushed(stage)
    stage.recovered(since)


@scenario("A3", "the object store's disk becomes read-only", "the same", started=False)
def store_disk_read_only(stage: Stage) -> None:
    """Remounted read-only while the day runs, and writable again later."""
    folder = stage.house.home / "objects" / "raw"
    _on_small_disk(stage, folder, "8m")
    stage.start()
    since = time.monotonic()
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    try:
        ask_to_flush(stage)
        in_error(stage, "Read-only file system")
        stage.detected(since)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
    since = time.monotonic()
    flushed(stage)
    stage.recovered(since)


@scenario(
    "A4",
    "S3: 5xx storm, 403, slow answers, lost answers, dead line",
    "bounded retries, ERROR with the cause, no loss",
    s3=True,
)
def s3_in_trouble(stage: Stage) -> None:
    """One trouble after the other, in an order drawn by lot, each until the archiver has felt it."""
    assert stage.to_s3 is not None
    assert stage.s3 is not None
    for trouble in stage.random.sample(("5xx", "403", "slow", "lost_answer", "timeout", "down"), 6):
        broken = stage.to_s3.broken
        since = time.monotonic()
        if trouble == "down":
            port, target = stage.to_s3._target, "http://127.0.0.1:9"
            stage.to_s3._target = target
        else:
            stage.to_s3.breaks(trouble)  # type: ignore[arg-type]
        ask_to_flush(stage)
        if trouble in ("5xx", "403", "timeout", "down"):
            stage.wait(lambda: stage.beat("archiver").get("state") == "error", f"ERROR by {trouble}", 90)
            status = stage.house.json("day", "status", ENV)
            assert (status["state"], bool(status["error"])) == ("ERROR", True)
        else:
            stage.wait(lambda broken=broken: stage.to_s3.broken > broken, "the store to be felt", 90)  # type: ignore[misc]
        if trouble == "down":
            stage.to_s3._target = port
        stage.to_s3.heal()
        flushed(stage, 90)
        stage.wait(
            lambda: stage.beat("archiver").get("state") == "archiving", "the archiver to say that it is well", 30
        )
        stage.notes[trouble] = round(time.monotonic() - since, 1)
    stage.flows()


@scenario(
    "A4",
    "S3 refuses everything while the day is ended",
    "END waits; never COMPLETE before it is stored",
    s3=True,
)
def s3_away_while_ending(stage: Stage) -> None:
    """The day is ENDING for as long as the store is away."""
    assert stage.to_s3 is not None
    stage.to_s3.breaks("5xx", methods=("PUT",))
    ending = stage.house.spawn("day", "end", ENV, "--date", stage.date)
    stage.wait(lambda: stage.beat("archiver").get("state") == "error", "the archiver to say it")
    stage.pause(1.0, 3.0)
    assert stage.shown()["state"] == "ENDING"
    assert ending.poll() is None
    since = time.monotonic()
    stage.to_s3.heal()
    _, errors = ending.communicate(timeout=90)
    assert ending.returncode in DONE, errors
    stage.rto_s = round(time.monotonic() - since, 2)


@scenario("A5", "S3: uploads cut at nine tenths", "the object is whole or not there", s3=True)
def s3_upload_cut(stage: Stage) -> None:
    """Some uploads break off; the next attempts get through."""
    assert stage.to_s3 is not None
    for _ in range(3):
        stage.to_s3.breaks("cut_upload", count=stage.random.randrange(1, 12))
        ask_to_flush(stage)
        flushed(stage, 120)
        stage.flows()
    stage.to_s3.heal()
    assert stage.to_s3.broken > 0


def _spoil(stage: Stage, folder: Path, kind: str) -> list[Path]:
    """Spoil stored segments; return what was done to whom."""
    segments = sorted(folder.glob("*.jsonl.zst"))
    victim = stage.random.choice(segments)
    victim.chmod(0o600)
    data = bytearray(victim.read_bytes())
    if kind == "flip":
        data[stage.random.randrange(len(data))] ^= 1 << stage.random.randrange(8)
        victim.write_bytes(data)
    elif kind == "delete":
        victim.unlink()
    elif kind == "cut":
        victim.write_bytes(data[: stage.random.randrange(len(data))])
    else:
        other = stage.random.choice([path for path in segments if path != victim])
        other.chmod(0o600)
        victim.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return [victim, other]
    return [victim]


@scenario(
    "A6",
    "stored segments: a bit flipped, one deleted, cut, two swapped",
    "`day verify` names the object and builds it again; without a copy a gap is declared; with the bytes back it passes",
)
def store_spoilt(stage: Stage) -> None:
    """Each kind of damage in a complete day, found from the store alone, and mended."""
    for _ in range(2):
        ask_to_flush(stage)
        flushed(stage)
        stage.flows()
    stage.end()
    folder = stage.archive_folder()
    kept = {path: path.read_bytes() for path in folder.glob("*.jsonl.zst")}
    for kind in stage.random.sample(("flip", "delete", "cut", "swap"), 4):
        victims = _spoil(stage, folder, kind)
        done = stage.house.ssmd("day", "verify", ENV, stage.date, check=6)
        assert any(path.name in done.stderr + done.stdout for path in victims), (kind, victims, done.stderr)
        for path in victims:
            rebuilt = stage.house.home / "rebuilt" / ENV / f"{stage.date}-{path.name}"
            assert rebuilt.read_bytes() == kept[path], (kind, path)
            path.write_bytes(rebuilt.read_bytes())
    assert stage.shown()["gaps"] == []
    stage.house.ssmd("day", "verify", ENV, stage.date, check=0)
    _spoilt_without_a_copy(stage, folder)


def _spoilt_without_a_copy(stage: Stage, folder: Path) -> None:
    """What neither spool nor stream has any more is a gap with its time and numbers, until the object is back."""

    async def purge(stores: Stores) -> None:
        await stores.raw_stream.purge(stage.date)

    stage.with_stores(purge)
    spool = stage.spool_folder()
    spool.rename(spool.with_suffix(".away"))
    victim = stage.random.choice(sorted(folder.glob("orderbook-*.jsonl.zst")))
    data = victim.read_bytes()
    batch = stage.random.choice([item for item in scan(data) if isinstance(item, Batch)])
    spoilt = bytearray(data)
    spoilt[(batch.start + batch.data_end) // 2] ^= 0x10
    victim.chmod(0o600)
    victim.write_bytes(spoilt)
    done = stage.house.ssmd("day", "verify", ENV, stage.date, check=6)
    (gap,) = stage.shown()["gaps"]
    assert (gap["cause"], gap["outcome"]) == ("archive_damaged", "stays")
    assert (gap["from_ns"], gap["to_ns"]) == (batch.header.recv_first_ns, batch.header.recv_last_ns)
    assert gap["scope"] == {
        "conn": batch.header.conn,
        "channel": "orderbook_delta",
        "batches": list(batch.header.span),
        "seq": {sid: [low, high] for sid, (low, high, _) in batch.header.seq.items()},
    }
    assert "lost (archive_damaged)" in done.stdout
    assert "(archive_damaged)" in stage.house.ssmd("day", "show", ENV, stage.date).stdout
    stage.house.ssmd("day", "verify", ENV, stage.date, check=6)
    victim.write_bytes(data)
    stage.house.ssmd("day", "verify", ENV, stage.date, check=0)
    (gap,) = stage.shown()["gaps"]
    assert gap["outcome"] == "healed"
    spool.with_suffix(".away").rename(spool)


@scenario(
    "A7", "power cut: torn spool tail, truncated open segment", "whole batches are kept, the rest comes from the stream"
)
def torn_files(stage: Stage) -> None:
    """What a crash leaves half written: a batch at the end of the spool, and the archiver's open segments."""
    archiver = stage.kill(ARCHIVER, signal.SIGSTOP)
    connector = stage.kill("capture.connector", signal.SIGSTOP)
    for path in (stage.house.home / "segments" / ENV / stage.date).glob("*/*.zst"):
        with path.open("r+b") as file:
            file.truncate(stage.random.randrange(path.stat().st_size + 1))
    newest = max(stage.spool_folder().glob("*.batches"), key=lambda path: path.stat().st_mtime_ns)
    since = time.monotonic()
    os.kill(connector, signal.SIGKILL)
    os.kill(archiver, signal.SIGKILL)
    data = newest.read_bytes()
    with newest.open("ab") as file:
        file.write(data[: stage.random.randrange(1, 400)])
    stage.recovered(since)


@scenario("A8", "two archivers of one day, stopped and continued at random", "no row twice, none missing")
def two_archivers(stage: Stage) -> None:
    """A second one is started by hand; each in turn stands still while the other stores."""
    log = (stage.folder / "second.log").open("wb")
    second = subprocess.Popen(
        [sys.executable, "-m", "ssmd_dagster.capture.archiver", ENV, stage.date],
        env=stage.house.environment(),
        stdout=log,
        stderr=log,
    )
    try:
        first = int(stage.wait(lambda: stage.pid(ARCHIVER), "the first archiver"))
        for _ in range(8):
            stopped = stage.random.choice((first, second.pid))
            try:
                os.kill(stopped, signal.SIGSTOP)
                ask_to_flush(stage)
                stage.pause(0.3, 1.5)
            finally:
                os.kill(stopped, signal.SIGCONT)
            stage.pause(0.1, 0.8)
        assert second.poll() is None
    finally:
        second.terminate()
        second.wait(20)
        log.close()
    stage.flows()


@scenario("A8", "an archiver that slept through a recovery", "its lower epoch is refused and it ends; no row twice")
def stale_archiver(stage: Stage) -> None:
    """Stopped, while the day is recovered under a new epoch with another archiver; then it wakes up."""
    log_path = stage.folder / "second.log"
    with log_path.open("wb") as log:
        second = subprocess.Popen(
            [sys.executable, "-m", "ssmd_dagster.capture.archiver", ENV, stage.date],
            env=stage.house.environment(),
            stdout=log,
            stderr=log,
        )
    try:
        stage.wait(lambda: "archiver" in log_path.read_text() or second.poll() is None, "the second archiver")
        stage.pause(2.0, 3.0)
        os.kill(second.pid, signal.SIGSTOP)
        before = stage.shown()["epoch"]
        stage.kill(ARCHIVER, signal.SIGSTOP)
        stage.kill("capture.connector", signal.SIGSTOP)
        stage.wait(lambda: stage.house.json("day", "status", ENV)["state"] == "ERROR", "the day to be in ERROR", 60)
        for words in (ARCHIVER, "capture.connector"):
            stage.kill(words)
        stage.recover()
        assert stage.shown()["epoch"] > before
        stage.flows()
        os.kill(second.pid, signal.SIGCONT)
        ask_to_flush(stage)
        stage.wait(lambda: second.poll() is not None, "the stale archiver to end")
        assert second.returncode == 5, log_path.read_text()[-2000:]
    finally:
        if second.poll() is None:
            second.kill()
        second.wait(20)


@scenario("A9", "messages in the stream that are no batches", "passed over and counted; the balance holds")
def poison(stage: Stage) -> None:
    """Junk on the subjects of the day, with and without headers, damaged copies of real batches, and malformed frames."""

    async def publish(stores: Stores) -> None:
        raw = stores.raw_stream
        batches = [message async for message in _some_batches(stores, stage.date)]
        subject = raw.subject(stage.date, "trade", "1-a-0")
        await stores.js.publish(subject, b"junk")
        await stores.js.publish(subject, b"junk", headers={"Nats-Msg-Id": "strange"})
        await stores.js.publish(subject, b"", headers={"Nats-Msg-Id": "a/b/c/d", "Ssmd-Records": "many"})
        for data in batches[:5]:
            spoilt = bytearray(data)
            spoilt[stage.random.randrange(len(spoilt))] ^= 4
            await stores.js.publish(raw.subject(stage.date, "ticker", "9-a-9"), bytes(spoilt))

    stage.with_stores(publish)
    stage.fault("malformed", count=5)
    stage.fault("unknown_type", count=5)
    stage.wait(lambda: stage.beat("archiver").get("passed_over", 0) >= 8, "the junk to be passed over")
    stage.flows()


async def _some_batches(stores: Stores, date: str):  # type: ignore[no-untyped-def]
    async with stores.raw_stream.consume(date) as consumer:
        for message in await consumer.fetch(2.0, 20):
            yield message.data


@scenario(
    "A10",
    "the archiver lags behind while midnight passes",
    "every row in its own day",
    started=False,
    ends=False,
    schedule={"timezone": "UTC", "day_start": "00:10", "day_end": "00:00", "auto_roll": True},
    simulator={"rate_per_second": 1500},
)
def backlog_over_midnight(stage: Stage) -> None:
    """The old day's archiver stands still over the boundary of a roll and catches up behind it."""
    roll_over_midnight(stage, stop_archiver=True)


def roll_over_midnight(stage: Stage, *, stop_archiver: bool, messages: int = 1_000) -> None:
    """Start a day shortly before midnight of the exchange's clock, roll into the next, and end that."""
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1)
    first, second = (midnight - timedelta(days=1)).date().isoformat(), midnight.date().isoformat()
    stage.exchange("clock", {"set": (midnight - timedelta(seconds=25)).isoformat()})
    stage.start(messages=messages)
    assert stage.date == first
    stopped = None
    if stop_archiver:
        stopped = stage.kill(ARCHIVER, signal.SIGSTOP)
    rolling = stage.house.spawn("day", "roll", ENV)
    setting = stage.setting()
    boundary_ns = int(midnight.timestamp()) * NS
    stage.wait(lambda: setting.clock() > boundary_ns + NS, "midnight", 60)
    if stopped is not None:
        os.kill(stopped, signal.SIGCONT)
    output, errors = rolling.communicate(timeout=120)
    assert rolling.returncode in DONE, output + errors
    stage.dates.append(second)
    stage.wait(lambda: stage.archived_or_open() > messages, "the new day's records", 60)
    stage.end()
    for date in (first, second):
        assert stage.shown(date)["state"] == "COMPLETE"
    windows = [json.loads((stage.archive_folder(date) / "manifest.json").read_text()) for date in (first, second)]
    assert windows[0]["close_ns"] == windows[1]["open_ns"] == boundary_ns
