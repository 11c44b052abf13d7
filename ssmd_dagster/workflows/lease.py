"""The lease of a day: who is at work on it. A courtesy that saves double work; the epoch is what fences.

A lease is gone when it was seen absent for one whole TTL. A cache that cannot be reached counts as held: the error says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

from ssmd_dagster.errors import RefusedError, UnreachableError
from ssmd_dagster.workflows.desk import Desk, Progress, actor_of

RENEWALS_PER_TTL = 3
LOOKS_PER_TTL = 20
CANCEL_AGAIN_S = 0.1

_log = logging.getLogger(__name__)


class HeldError(RefusedError):
    """Another is at work on the day, or was until it was killed: its lease ends by itself."""

    transient = True


class Lease:
    """The lease of one day, held by one desk and renewed until it is released."""

    def __init__(self, desk: Desk, date: str) -> None:
        self._desk, self._date = desk, date
        self._ttl_s = desk.setting.env.lease_ttl_s
        self._renewing: asyncio.Task[None] | None = None

    async def acquire(self) -> None:
        """Take the lease and keep it; raise `HeldError`, naming the holder, where somebody else has it."""
        if not await self._desk.stores.cache.acquire(self._date, self._desk.owner, self._ttl_s):
            raise held_by(self._desk, self._date, await self._desk.stores.cache.holder(self._date))
        self._renewing = asyncio.create_task(self._renew())

    async def release(self) -> None:
        """Stop renewing and give the lease back."""
        # A cancellation can get lost in `asyncio.wait_for` (before Python 3.12), which the client uses.
        while self._renewing is not None and not self._renewing.done():
            self._renewing.cancel()
            await asyncio.wait({self._renewing}, timeout=CANCEL_AGAIN_S)
        with contextlib.suppress(UnreachableError):  # it ends by itself after its TTL
            await self._desk.stores.cache.release(self._date, self._desk.owner)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._ttl_s / RENEWALS_PER_TTL)
            try:
                # Acquiring renews an own lease and takes back one that a flushed cache has forgotten.
                if not await self._desk.stores.cache.acquire(self._date, self._desk.owner, self._ttl_s):
                    _log.warning("the lease of %s was taken by another; its epoch decides who may go on", self._date)
            except UnreachableError as error:
                _log.warning("lease not renewed: %s", error)


async def wait_until_gone(desk: Desk, date: str, verb: str) -> None:
    """Return once the day's lease was seen absent for one whole TTL.

    Raises `HeldError`, naming the holder, as soon as it is seen present.
    """
    ttl_s = desk.setting.env.lease_ttl_s
    deadline = time.monotonic() + ttl_s
    first = True
    while True:
        holder = await desk.stores.cache.holder(date)
        if holder is not None and holder != desk.owner:
            raise held_by(desk, date, holder)
        left_s = deadline - time.monotonic()
        if holder == desk.owner or left_s <= 0:
            return
        if first:
            first = False
            text = f"An earlier attempt was cut off; making sure for {ttl_s:.0f} s that nobody is at work on it"
            desk.report(Progress("note", verb, date, "lease", text))
        await asyncio.sleep(min(left_s, ttl_s / LOOKS_PER_TTL))


def held_by(desk: Desk, date: str, holder: str | None) -> HeldError:
    """Make the error that names who is at work on a day."""
    return HeldError(
        f"trading day {date} is being worked on by {actor_of(holder or 'another actor')}",
        where=desk.env,
        do=f"Wait for it (`ssmd day status {desk.env}`); if it was killed, its lease ends in "
        f"{desk.setting.env.lease_ttl_s:.0f} s and the same command takes over.",
    )
