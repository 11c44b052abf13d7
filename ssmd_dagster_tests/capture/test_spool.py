"""What is in the spool is whole and safe; what is not leaves no trace."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ssmd_dagster.capture import spool as spool_module
from ssmd_dagster.capture.spool import (
    SpoolWriter,
    append_to_spool,
    next_connection,
    read_spool,
    read_spool_back,
    shard_of,
    spool_path,
    spooled_connections,
    spooled_records,
)
from ssmd_dagster_tests.capture.recordings import a_recording

CONN = "812-a-0"


def test_a_connection_has_one_file_and_never_a_second(tmp_path: Path) -> None:
    """Creating a writer for a connection that has a file is refused and leaves the file alone."""
    writer = SpoolWriter(tmp_path / "day", CONN)
    writer.append([b"first"])
    with pytest.raises(FileExistsError):
        SpoolWriter(tmp_path / "day", CONN)
    writer.close()
    assert spool_path(tmp_path / "day", CONN).read_bytes() == b"first"


def test_the_spool_is_for_its_owner_only(tmp_path: Path) -> None:
    """Folders are made 0700, files 0600."""
    SpoolWriter(tmp_path / "env" / "day", CONN).close()
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert set(modes.values()) == {0o700, 0o600}


def test_parts_stand_end_to_end_at_the_offsets_that_are_returned(tmp_path: Path) -> None:
    """Each part lies where `append` says."""
    writer = SpoolWriter(tmp_path, CONN)
    parts = [b"a" * 10, b"b" * 3, b"c" * 70_000]
    offsets = [*writer.append(parts[:2]), *writer.append(parts[2:])]
    writer.close()
    data = spool_path(tmp_path, CONN).read_bytes()
    assert [data[offset : offset + len(part)] for offset, part in zip(offsets, parts, strict=True)] == parts
    assert len(data) == writer.size_bytes == 70_013


@pytest.mark.parametrize("call", ["fsync", "pwrite"])
def test_an_append_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """A full disk costs nothing that is there already, and the same append succeeds later."""
    writer = SpoolWriter(tmp_path, CONN)
    writer.append([b"kept"])
    real_pwrite, calls = os.pwrite, 0

    def full(fd: int, data: Any = b"", offset: int = 0) -> int:
        nonlocal calls
        calls += 1
        if call == "fsync" or calls == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_pwrite(fd, bytes(data)[:4], offset)  # a short write, as a filling disk gives

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match="No space"):
            writer.append([b"torn and ", b"torn again"])
    assert spool_path(tmp_path, CONN).read_bytes() == b"kept"
    assert writer.append([b"and ", b"more"]) == [4, 8]
    writer.close()
    assert spool_path(tmp_path, CONN).read_bytes() == b"keptand more"


def test_a_file_that_could_not_be_made_durable_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the folder cannot be synced, trying again meets no file of one's own."""
    with monkeypatch.context() as patch:
        patch.setattr(
            spool_module, "_fsync_directory", lambda _directory: (_ for _ in ()).throw(OSError(errno.EIO, ""))
        )
        with pytest.raises(OSError, match=r"Errno 5"):
            SpoolWriter(tmp_path, CONN)
    assert list(tmp_path.iterdir()) == []
    SpoolWriter(tmp_path, CONN).close()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.data())
def test_a_torn_tail_is_passed_over_from_both_ends(tmp_path: Path, data: st.DataObject) -> None:
    """Cut at any byte, reading gives every whole batch before the cut, forwards and backwards alike."""
    recording = a_recording(frames=40)
    path = recording.write(tmp_path)
    batches = recording.batches()
    whole = path.read_bytes()
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept: list[bytes] = []
    for batch in batches:
        if sum(map(len, kept)) + len(batch) > cut:
            break
        kept.append(batch)
    found = list(read_spool(path))
    assert [encoded for _, encoded in found] == kept
    assert [encoded for _, encoded in read_spool_back(path)] == kept[::-1]
    blocks = [unsealed.block for flush in recording.flushes for unsealed in flush]
    assert [spooled_records(encoded, batch) for batch, encoded in found] == blocks[: len(kept)]


def test_reading_may_stop_at_any_batch(tmp_path: Path) -> None:
    """Whoever needs only the first or the last batch closes the file by letting go."""
    recording = a_recording(frames=40)
    path = recording.write(tmp_path)
    batches = recording.batches()
    assert next(read_spool(path))[1] == batches[0]
    assert next(read_spool_back(path))[1] == batches[-1]


def test_appending_behind_a_torn_tail_cuts_it_off(tmp_path: Path) -> None:
    """Whoever finishes the file of a killed process writes behind its last whole batch."""
    first, second = a_recording(frames=40).batches()[:2]
    path = tmp_path / "x.batches"
    path.write_bytes(first + second[:-1])
    append_to_spool(path, len(first), second)
    assert path.read_bytes() == first + second


def test_connections_are_listed_in_the_order_in_which_they_were_opened(tmp_path: Path) -> None:
    """By epoch, shard and number, not by the letters of the name; other files are passed over."""
    for name in ("812-a-10", "812-a-9", "1000-a-0", "812-b-0", "812-a-0"):
        spool_path(tmp_path, name).touch()
    for other in ("812-a-0.tmp", "notes.batches", "812-A-1.batches"):
        (tmp_path / other).touch()
    assert spooled_connections(tmp_path) == ["812-a-0", "812-a-9", "812-a-10", "812-b-0", "1000-a-0"]
    assert [shard_of(conn) for conn in spooled_connections(tmp_path)] == ["a", "a", "a", "b", "a"]
    assert spooled_connections(tmp_path / "none") == []


def test_the_next_connection_has_an_id_that_no_file_has(tmp_path: Path) -> None:
    """Numbers count on per epoch and shard, also over one whose file is not there yet."""
    assert next_connection(tmp_path, 812, "a") == "812-a-0"
    for name in ("812-a-0", "812-a-10", "812-b-3", "81-a-77"):
        spool_path(tmp_path, name).touch()
    assert next_connection(tmp_path, 812, "a") == "812-a-11"
    assert next_connection(tmp_path, 812, "b") == "812-b-4"
    assert next_connection(tmp_path, 900, "a") == "900-a-0"
    assert next_connection(tmp_path, 812, "a", after="812-a-12") == "812-a-13"
    assert next_connection(tmp_path, 900, "a", after="812-a-12") == "900-a-0"
