"""The object store: the same promises of a local folder and of an S3."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from ssmd_dagster.errors import ConfigurationError, NotFoundError, SsmdError, UnreachableError
from ssmd_dagster.stores import objects, parts
from ssmd_dagster.stores.objects import (
    LocalObjectStore,
    ObjectExistsError,
    ObjectInfo,
    ObjectStore,
    S3ObjectStore,
    StorageError,
)
from ssmd_dagster_tests import servers

if TYPE_CHECKING:
    from pathlib import Path

KEY = "kalshi/2025/12/14/trades-00.jsonl.zst"


def s3_store(server: servers.S3Server, bucket: str, **changes: str) -> S3ObjectStore:
    """Open a bucket of the test server."""
    settings = {
        "region": "us-east-1",
        "endpoint": server.url,
        "access_key_id": server.access_key_id,
        "secret_access_key": server.secret_access_key,
    }
    return S3ObjectStore(bucket, **{**settings, **changes})


@pytest.fixture(params=["local", "s3", "s3-prefix"])
def store(request: pytest.FixtureRequest, tmp_path: Path, env_name: str) -> ObjectStore:
    """An empty bucket."""
    if request.param == "local":
        return LocalObjectStore(tmp_path / "objects" / "ssmd-raw")
    server: servers.S3Server = request.getfixturevalue("s3")
    server.make_bucket(env_name)
    return s3_store(server, env_name, prefix="team/ssmd" if request.param == "s3-prefix" else "")


async def test_an_object_is_read_back_whole_and_in_parts(store: ObjectStore, tmp_path: Path) -> None:
    """Bytes and files become objects; get, ranges, chunks and sizes agree."""
    content = os.urandom(300_000)
    source = tmp_path / "source"
    source.write_bytes(content)
    await store.create(KEY, content)
    await store.create("from-file", source)
    for key in (KEY, "from-file"):
        assert await store.get(key) == content
        assert await store.head(key) == len(content)
        assert await store.get_range(key, 1000, 77) == content[1000:1077]
        assert await store.get_range(key, 299_990, 77) == content[299_990:]
        assert b"".join([chunk async for chunk in store.stream(key, 64 * 1024)]) == content
    await store.create("empty", b"")
    assert (await store.get("empty"), await store.head("empty")) == (b"", 0)


async def test_an_existing_object_is_never_overwritten(store: ObjectStore) -> None:
    """The second writer is told, and the first one's bytes stay."""
    await store.create(KEY, b"first")
    with pytest.raises(ObjectExistsError, match="exists already"):
        await store.create(KEY, b"second")
    assert await store.get(KEY) == b"first"


async def test_of_racing_writers_one_wins(store: ObjectStore) -> None:
    """Ten writers of one key: one succeeds, and what is read is its bytes."""
    outcomes = await asyncio.gather(
        *(store.create(KEY, b"%d" % number * 1000) for number in range(10)), return_exceptions=True
    )
    winners = [number for number, outcome in enumerate(outcomes) if outcome is None]
    assert len(winners) == 1
    assert sum(isinstance(outcome, ObjectExistsError) for outcome in outcomes) == 9
    assert await store.get(KEY) == b"%d" % winners[0] * 1000


async def test_missing_objects_are_not_found(store: ObjectStore) -> None:
    """Whole, part, chunks and size of what is not there."""
    with pytest.raises(NotFoundError, match="no such object"):
        await store.get(KEY)
    with pytest.raises(NotFoundError):
        await store.get_range(KEY, 0, 1)
    with pytest.raises(NotFoundError):
        await store.head(KEY)
    with pytest.raises(NotFoundError):
        _ = [chunk async for chunk in store.stream(KEY)]


async def test_lists_are_sorted_and_end_at_the_folder(store: ObjectStore) -> None:
    """A folder's objects come sorted by key, neighbours that merely begin alike do not."""
    for number in (10, 2, 0):
        await store.create(f"kalshi/2025/12/14/trades-{number:02d}.jsonl.zst", bytes(number))
    await store.create("kalshi/2025/12/141/x", b"")
    await store.create("kalshi/2025/12/14/sub/x", b"x")
    assert await store.list("kalshi/2025/12/14/") == [
        ObjectInfo("kalshi/2025/12/14/sub/x", 1),
        ObjectInfo("kalshi/2025/12/14/trades-00.jsonl.zst", 0),
        ObjectInfo("kalshi/2025/12/14/trades-02.jsonl.zst", 2),
        ObjectInfo("kalshi/2025/12/14/trades-10.jsonl.zst", 10),
    ]
    assert len(await store.list()) == 5
    assert await store.list("kalshi/2026/") == []


async def test_encoded_tickers_are_keys_like_any_other(store: ObjectStore) -> None:
    """A percent sign is a character of the key, not an escape of the store."""
    key = "kalshi/v1/trade/2025/12/14/KXBTCD-26FEB07-T98249%2E99/data.capnp.zst"
    await store.create(key, b"x")
    assert await store.get(key) == b"x"
    assert await store.list("kalshi/v1/trade") == [ObjectInfo(key, 1)]


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".incoming/x", "a b", "a\n", "ä", "a\x00"])
async def test_keys_that_could_leave_the_bucket_are_refused(store: ObjectStore, key: str) -> None:
    """Nothing is read or written under a name that is no key."""
    for attempt in (store.create(key, b""), store.get(key), store.head(key)):
        with pytest.raises(SsmdError, match="no key of an object"):
            await attempt


def test_urls_say_where_objects_are(tmp_path: Path) -> None:
    """Local objects have a path, those of S3 an s3:// address."""
    local = LocalObjectStore(tmp_path / "raw")
    assert local.url("kalshi/2025/12/12/") == f"{tmp_path}/raw/kalshi/2025/12/12/"
    plain = S3ObjectStore("ssmd-raw", region="us-east-1")
    assert plain.url("kalshi/2025/12/12/") == "s3://ssmd-raw/kalshi/2025/12/12/"
    assert S3ObjectStore("b", region="us-east-1", prefix="team/x").url("k") == "s3://b/team/x/k"


async def test_the_keys_of_a_prefix_do_not_show_it(s3: servers.S3Server, env_name: str) -> None:
    """Two environments can share a bucket under different prefixes without seeing each other."""
    s3.make_bucket(env_name)
    one, two = s3_store(s3, env_name, prefix="one"), s3_store(s3, env_name, prefix="two")
    await one.create("k", b"1")
    await two.create("k", b"2")
    assert await one.list() == [ObjectInfo("k", 1)]
    assert await s3_store(s3, env_name).list() == [ObjectInfo("one/k", 1), ObjectInfo("two/k", 1)]


async def test_a_missing_bucket_is_a_matter_of_configuration(s3: servers.S3Server) -> None:
    """It is not a missing object, and no retry helps."""
    store = s3_store(s3, "no-such-bucket")
    for attempt in (store.create("k", b""), store.get("k"), store.list()):
        with pytest.raises(ConfigurationError, match="bucket"):
            await attempt


async def test_a_service_that_is_away_is_unreachable(tmp_path: Path) -> None:
    """Nobody listens: a transient error with the address, after bounded retries."""
    port = servers.free_port()
    store = S3ObjectStore(
        "b", region="us-east-1", endpoint=f"http://127.0.0.1:{port}", access_key_id="k", secret_access_key="s"
    )
    with pytest.raises(UnreachableError, match=f"127.0.0.1:{port}"):
        await store.create("k", b"")


@pytest.mark.parametrize(
    ("status", "expected"),
    [(403, ConfigurationError), (401, ConfigurationError), (400, ConfigurationError), (503, UnreachableError)],
)
async def test_answers_are_told_apart_by_whether_a_retry_can_help(status: int, expected: type[SsmdError]) -> None:
    """Refused access needs a person, a service in trouble needs time."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    store = S3ObjectStore(
        "b", region="us-east-1", endpoint=f"http://127.0.0.1:{port}", access_key_id="k", secret_access_key="s"
    )
    async with server:
        with pytest.raises(expected) as caught:
            await store.get("k")
        assert caught.value.transient == (expected is UnreachableError)


async def test_a_disk_that_fails_is_transient(tmp_path: Path) -> None:
    """What the operating system refuses is told by name, and nothing is left behind."""
    store = LocalObjectStore(tmp_path)
    with pytest.raises(StorageError, match="cannot be written: No such file") as caught:
        await store.create("k", tmp_path / "not-there")
    assert caught.value.transient
    (tmp_path / "folder").write_bytes(b"a file where a folder should be")
    with pytest.raises(StorageError, match="cannot be written"):
        await store.create("folder/k", b"")
    assert list((tmp_path / ".incoming").iterdir()) == []
    assert await store.list() == [ObjectInfo("folder", 31)]


_KILLED_WRITER = """
import asyncio, os, pathlib, signal, sys
from ssmd_dagster.stores import objects, parts
real = os.fsync
calls = 0
def fsync(descriptor):
    global calls
    calls += 1
    if calls == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)
    real(descriptor)
store = objects.LocalObjectStore(pathlib.Path(sys.argv[1]))
os.fsync = fsync
asyncio.run(store.create("a/b/c", b"whole" * 100_000))
"""


@pytest.mark.parametrize("crash_point", [1, 2, 3, 4])
async def test_a_writer_killed_at_any_point_leaves_all_or_nothing(tmp_path: Path, crash_point: int) -> None:
    """After SIGKILL the object is absent or whole; the next writer succeeds or finds it, and cleans up."""
    store = LocalObjectStore(tmp_path)
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", _KILLED_WRITER, str(tmp_path), str(crash_point)], timeout=30, check=False
    )
    assert done.returncode == -signal.SIGKILL
    found = await store.list()
    assert found in ([], [ObjectInfo("a/b/c", 500_000)])
    assert (found == []) == (crash_point < 4)
    if found:
        with pytest.raises(ObjectExistsError):
            await store.create("a/b/c", b"whole" * 100_000)
    else:
        await store.create("a/b/c", b"whole" * 100_000)
    assert await store.get("a/b/c") == b"whole" * 100_000
    assert list((tmp_path / ".incoming").iterdir()) == []


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Let a part be as small as S3 takes it, and a file be large from there on; return those bytes."""
    monkeypatch.setattr(objects, "_LARGE_BYTES", 5 << 20)
    monkeypatch.setattr(parts, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(parts, "ATTEMPTS", 2)
    return 5 << 20


@pytest.mark.parametrize("prefix", ["", "team/ssmd"])
async def test_a_large_file_goes_in_parts_and_is_never_put_over_another(
    s3: servers.S3Server, tmp_path: Path, env_name: str, in_parts: int, prefix: str
) -> None:
    """It is read back as it was; a second one is refused, and its parts are taken away."""
    s3.make_bucket(env_name)
    store = s3_store(s3, env_name, prefix=prefix)
    content = os.urandom(in_parts * 2 + 17)
    source, other = tmp_path / "source", tmp_path / "other"
    source.write_bytes(content)
    other.write_bytes(content[::-1])
    await store.create("large", source)
    with pytest.raises(ObjectExistsError):
        await store.create("large", other)
    with pytest.raises(ObjectExistsError):  # another writer was quicker
        await asyncio.to_thread(store._create_in_parts, "large", other)
    assert b"".join([chunk async for chunk in store.stream("large")]) == content
    assert await store.list() == [ObjectInfo("large", len(content))]
    client = parts.open_client(
        region="us-east-1",
        endpoint=s3.url,
        access_key_id=s3.access_key_id,
        secret_access_key=s3.secret_access_key,
    )
    assert client.list_multipart_uploads(Bucket=env_name).get("Uploads", []) == []


async def test_a_large_file_meets_the_same_errors(
    s3: servers.S3Server, tmp_path: Path, env_name: str, in_parts: int
) -> None:
    """A bucket that is missing is a matter of configuration, a service that is away is not."""
    source = tmp_path / "source"
    source.write_bytes(bytes(in_parts + 1))
    with pytest.raises(ConfigurationError, match="bucket"):
        await s3_store(s3, f"{env_name}-gone").create("large", source)
    away = s3_store(s3, env_name, endpoint=f"http://127.0.0.1:{servers.free_port()}")
    with pytest.raises(UnreachableError):
        await away.create("large", source)
