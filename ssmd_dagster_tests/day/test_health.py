"""When a running day is in trouble, and when it only looks like it."""

from __future__ import annotations

from typing import Any

from ssmd_dagster.day.health import CONFIRM_S, QUIET_S, Look, is_doubtful, judge
from ssmd_dagster.day.payloads import DriftCount, DriftFound

NOW = 1_765_700_000_000_000_000
_NS = 1_000_000_000


def look(*, at_ns: int = NOW, quiet_s: int = 1, without: str = "", error: str | None = None, **more: Any) -> Look:
    """Return a look at a connector and an archiver that are well but for what is asked."""
    beats: dict[str, dict[str, Any]] = {
        "connector-a": {
            "error": error,
            "exit_code": more.pop("exit_code", None),
            "last_frame_ns": at_ns - quiet_s * _NS,
        },
        "archiver": {"error": None, "exit_code": None},
    }
    beats.pop(without, None)
    return Look(at_ns=at_ns, components=("connector-a", "archiver"), recorders=("connector-a",), beats=beats, **more)


def test_a_day_that_is_well_has_no_error() -> None:
    """Frames flow, everybody gives heartbeats."""
    verdict = judge(look(), {})
    assert (verdict.error, verdict.warnings, verdict.seen) == (None, (), {})


def test_a_stream_that_is_nearly_full_is_a_warning() -> None:
    """What it takes is lost only once the spool is full too."""
    verdict = judge(look(stream_share=0.9), {})
    assert verdict.error is None
    assert [text for text in verdict.warnings if "90% full" in text] == list(verdict.warnings) != []


def test_a_missing_heartbeat_counts_when_it_is_seen_twice() -> None:
    """A cache that was emptied, or a process that its supervisor brings back, is no alarm."""
    first = judge(look(without="archiver"), {})
    assert first.error is None
    assert judge(look(), first.seen).seen == {}
    later = judge(look(without="archiver", at_ns=NOW + CONFIRM_S * _NS), first.seen)
    assert (later.error, later.component) == ("archiver gives no heartbeat", "archiver")


def test_a_process_that_says_that_it_cannot_go_on_counts_at_once() -> None:
    """It has ended with an exit code; an error without one may pass."""
    verdict = judge(look(error="key refused", exit_code=8), {})
    assert (verdict.error, verdict.component) == ("connector-a: key refused", "connector-a")
    assert judge(look(error="no answer"), {}).error is None


def test_silence_is_an_error_only_while_the_exchange_is_open() -> None:
    """Closed, it is a warning; where the exchange does not say, nothing is claimed."""
    text = f"no frame for more than {QUIET_S} s although the exchange says that it is open"
    quiet = QUIET_S + 1
    first = judge(look(open=True, quiet_s=quiet), {})
    assert (first.error, list(first.seen)) == (None, [text])
    assert judge(look(open=True, at_ns=NOW + 15 * _NS, quiet_s=quiet), first.seen).error == text
    closed = judge(look(open=False, at_ns=NOW + 15 * _NS, quiet_s=quiet), first.seen)
    assert (closed.error, closed.warnings) == (None, ("the exchange says that it is closed",))
    assert judge(look(open=None, quiet_s=quiet), {}).seen == {}


def test_batches_that_stay_in_the_spool_are_a_warning() -> None:
    """Nothing else of the recording suffers, so that no process has to be started anew."""
    seen = look()
    seen.beats["connector-a"]["refused_batches"] = 2  # type: ignore[index]  # it is a dict
    verdict = judge(seen, {})
    assert (verdict.error, len(verdict.warnings)) == (None, 1)
    assert "connector-a: 2 batches are too large" in verdict.warnings[0]


def test_an_archive_that_lags_behind_is_a_warning_and_a_quiet_exchange_is_not() -> None:
    """The lag is counted from the last frame that came."""
    assert judge(look(lag_ms=90_000), {}).warnings == ("the archive lags 89 s behind",)
    assert judge(look(lag_ms=90_000, quiet_s=89), {}).warnings == ()


def test_messages_of_no_known_type_are_a_warning_while_the_day_runs() -> None:
    """They are counted, and make no ERROR."""
    verdict = judge(look(unknown=1_200), {})
    assert verdict.error is None
    assert verdict.warnings == ("drift: 1,200 messages so far that are of no known type or cannot be read",)
    newest = DriftFound(fingerprints=1, most=(DriftCount(kind="key", name="trade.msg.foo", json_type="int", count=7),))
    assert judge(look(drift=newest), {}).warnings == (
        "drift: 1 unknown keys, types or shapes (key trade.msg.foo int ×7) in the newest messages",
    )


def test_in_announced_maintenance_neither_silence_nor_a_lost_connection_is_an_error() -> None:
    """Whether the exchange says that it is closed or says nothing at all; a dead process still is one."""
    error, later = "no answer", NOW + 15 * _NS
    for answer in (None, False):
        first = judge(look(error=error, open=answer, maintenance=True, quiet_s=QUIET_S + 1), {})
        verdict = judge(look(error=error, open=answer, maintenance=True, at_ns=later, quiet_s=QUIET_S + 16), first.seen)
        assert verdict.error is None
        assert verdict.warnings == ("connector-a: no answer", "the exchange is in announced maintenance")
    first = judge(look(open=True, maintenance=True, quiet_s=QUIET_S + 1), {})
    assert (first.error, first.seen) == (None, {})
    dead = judge(look(without="archiver", maintenance=True), {"archiver gives no heartbeat": NOW - CONFIRM_S * _NS})
    assert dead.error == "archiver gives no heartbeat"


def test_a_lost_connection_is_an_error_while_the_exchange_is_open_or_gone_unannounced() -> None:
    """The exchange is asked as soon as a recorder has no connection; closed without a word before, it is a warning."""
    assert [is_doubtful(look()), is_doubtful(look(error="no answer")), is_doubtful(look(quiet_s=QUIET_S + 1))] == [
        False,
        True,
        True,
    ]
    for answer, error in ((True, "connector-a: no answer"), (None, "connector-a: no answer"), (False, None)):
        seen = {"connector-a: no answer": NOW - CONFIRM_S * _NS}
        assert judge(look(error="no answer", open=answer), seen).error == error
