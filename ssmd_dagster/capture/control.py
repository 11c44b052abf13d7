"""How a workflow speaks with a running capture process: one small request and answer over core NATS.

Subject `{env}.control.{component}` (with the date between, for the processes of one day); JSON both ways. An answer carries
the component's status, of which `error` is what it is troubled by; a refused request is answered with `refused` alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ssmd_dagster.errors import SsmdError, UnreachableError

ANSWER_TIMEOUT_S = 5.0
_POLL_S = 0.1


def control_subject(env: str, component: str, date: str | None = None) -> str:
    """Return the subject on which a component takes requests."""
    return f"{env}.control.{date}.{component}" if date else f"{env}.control.{component}"


async def request(
    nc: Client, subject: str, command: str, *, coming_up_s: float = 0.0, **arguments: Any
) -> dict[str, Any]:
    """Ask a component and return its answer; one that is not there yet, as after a crash, has `coming_up_s` to come.

    Raises `UnreachableError` where nobody answers within `ANSWER_TIMEOUT_S`, `SsmdError` with its words where it refuses.
    """
    body = msgspec.json.encode({"command": command, **arguments})
    deadline = time.monotonic() + coming_up_s
    try:
        while True:
            try:
                answer = await nc.request(subject, body, timeout=ANSWER_TIMEOUT_S)
                break
            except nats.errors.NoRespondersError:
                if time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_POLL_S)
    except (nats.errors.TimeoutError, nats.errors.NoRespondersError, nats.errors.ConnectionClosedError) as error:
        raise UnreachableError(
            f"{subject.rsplit('.', 1)[-1]} does not answer `{command}`",
            where=subject,
            do="See its log under SSMD_HOME/logs, and `ssmd day status`.",
        ) from error
    decoded: dict[str, Any] = msgspec.json.decode(answer.data)
    if "refused" in decoded:
        raise SsmdError(f"{subject.rsplit('.', 1)[-1]}: {decoded['refused']}", where=subject)
    return decoded


async def serve(
    nc: Client, subject: str, answer: Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]
) -> Subscription:
    """Answer requests on `subject` with `answer(command, arguments)` until the subscription is ended."""

    async def handle(message: Msg) -> None:
        try:
            arguments = msgspec.json.decode(message.data, type=dict[str, Any])
            reply = await answer(str(arguments.pop("command", "")), arguments)
        except (msgspec.DecodeError, SsmdError) as error:
            reply = {"refused": str(error)}
        await message.respond(msgspec.json.encode(reply))

    return await nc.subscribe(subject, cb=handle)
