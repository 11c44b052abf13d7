"""Is a running day well? One look at its processes against the last one, and the verdict. Pure.

A trouble counts once two looks in a row have seen it, so that a cache that was emptied or a process that its supervisor
brings back raises no alarm. Whether the exchange is open is asked only where no frame comes: it is one request. What is
done about an ERROR belongs to `recover`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from ssmd_dagster.day.checks import drift_words
from ssmd_dagster.day.payloads import DriftFound
from ssmd_dagster.day.retention import nearly_full_words

QUIET_S = 120
"""How long an open exchange may send nothing."""
LAG_WARNING_S = 60
CONFIRM_S = 10
"""A trouble counts when it was seen this long ago too."""

_NS = 1_000_000_000


class Look(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen at one instant. `open` is None where the exchange was not asked or did not answer.

    `components` are those that a running day must hear from, `recorders` those of them that hold a socket; `maintenance` says
    that the exchange has announced one for now. `unknown` counts the day's messages of types that no reader knows, and those that
    are no message at all, `drift` is what the newest messages have that is unknown; `stream_share` is how full the raw stream is.
    """

    at_ns: int
    components: Sequence[str]
    recorders: Sequence[str]
    beats: Mapping[str, Mapping[str, Any]]
    open: bool | None = None
    maintenance: bool = False
    lag_ms: float = 0.0
    stream_share: float = 0.0
    unknown: int = 0
    drift: DriftFound = DriftFound(fingerprints=0)


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """`error` is what makes the day an ERROR, with the `component` concerned; `warnings` do not.

    `seen` is to be kept for the next look: trouble → when it was first seen.
    """

    error: str | None = None
    component: str | None = None
    warnings: tuple[str, ...] = ()
    seen: dict[str, int] = {}


def quiet_for_s(look: Look) -> float | None:
    """Return for how long no recorder has had a frame; None where none is connected or none had one yet."""
    last = [
        int(beat["last_frame_ns"]) for name in look.recorders if (beat := look.beats.get(name, {})).get("last_frame_ns")
    ]
    return (look.at_ns - max(last)) / _NS if last else None


def is_doubtful(look: Look) -> bool:
    """Say whether the exchange should be asked if it is open: nothing comes, or there is no connection to it."""
    quiet_s = quiet_for_s(look)
    return (quiet_s is not None and quiet_s > QUIET_S) or any(_cannot_connect(look, name) for name in look.recorders)


def _cannot_connect(look: Look, name: str) -> bool:
    beat = look.beats.get(name, {})
    return bool(beat.get("error")) and beat.get("exit_code") is None


def unknown_words(count: int) -> str:
    """Return in words that a running day has messages which no reader knows."""
    return f"{count:,} messages so far that are of no known type or cannot be read"


def judge(look: Look, seen: Mapping[str, int]) -> Verdict:
    """Judge a look; `seen` is what the verdict before it kept."""
    found: dict[str, tuple[str, bool]] = {}
    warnings: list[str] = []
    # Where the exchange is closed nobody can connect to it, and what has been announced need not be said by it again.
    closed = look.open is False or (look.maintenance and look.open is None)
    for name in look.components:
        beat = look.beats.get(name)
        if beat is None:
            found[f"{name} gives no heartbeat"] = (name, False)
        elif beat.get("error"):
            text = f"{name}: {beat['error']}"
            if closed and name in look.recorders and _cannot_connect(look, name):
                warnings.append(text)
            else:
                found[text] = (name, beat.get("exit_code") is not None)
    quiet_s = quiet_for_s(look)
    if quiet_s is not None and quiet_s > QUIET_S and look.open is True and not look.maintenance:
        found[f"no frame for more than {QUIET_S} s although the exchange says that it is open"] = (
            look.recorders[0],
            False,
        )
    confirmed = [
        (text, name)
        for text, (name, final) in found.items()
        if final or look.at_ns - seen.get(text, look.at_ns) >= CONFIRM_S * _NS
    ]
    lag_s = look.lag_ms / 1000 - (quiet_s or 0.0)
    if lag_s > LAG_WARNING_S:
        warnings.append(f"the archive lags {lag_s:.0f} s behind")
    if (full := nearly_full_words(look.stream_share)) is not None:
        warnings.append(full)
    for name in look.recorders:
        if refused := look.beats.get(name, {}).get("refused_batches"):
            warnings.append(f"{name}: {refused} batches are too large for NATS (`max_payload`) and stay in the spool")
    if look.maintenance and is_doubtful(look):
        warnings.append("the exchange is in announced maintenance")
    elif look.open is False:
        warnings.append("the exchange says that it is closed")
    if look.unknown:
        warnings.append(f"drift: {unknown_words(look.unknown)}")
    if look.drift.fingerprints:
        warnings.append(f"drift: {drift_words(look.drift)} in the newest messages")
    kept = {text: seen.get(text, look.at_ns) for text in found}
    if not confirmed:
        return Verdict(warnings=tuple(warnings), seen=kept)
    return Verdict(
        error="; ".join(text for text, _ in confirmed), component=confirmed[0][1], warnings=tuple(warnings), seen=kept
    )
