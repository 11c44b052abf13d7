"""Refuse to go on with a journal that has lost days: the store holds the manifest of one that the journal does not know.

A server that was set up anew, or restored from an old backup, would give out epochs a second time. Not here: what a day is.
"""

from __future__ import annotations

import logging
from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from datetime import timedelta

import msgspec

from ssmd_dagster.archive.layout import day_prefix, manifest_revision
from ssmd_dagster.day.reconcile import LOOK_BACK_DAYS
from ssmd_dagster.errors import SsmdError, UnreachableError
from ssmd_dagster.workflows.desk import Desk

_log = logging.getLogger(__name__)


class _Claims(msgspec.Struct, frozen=True):
    env: str
    journal_seq: int


async def refuse_journal_behind(desk: Desk) -> None:
    """Hold the journal, as it was last read, against the newest manifest of the last `LOOK_BACK_DAYS` days.

    A store that does not answer is no reason not to record; then nothing is checked.

    Raises:
        SsmdError: The journal ends before that manifest, or has no such day.
    """
    today = Date.fromisoformat(desk.today())
    try:
        for back in range(LOOK_BACK_DAYS + 1):
            if await _is_known(desk, (today - timedelta(days=back)).isoformat()):
                return
    except UnreachableError as error:
        _log.warning("the journal is not held against the store: %s", error)


async def _is_known(desk: Desk, date: str) -> bool:
    """Say whether the date has a manifest of this environment that the journal knows of; raise where it does not."""
    listed = await desk.stores.raw.list(day_prefix(desk.setting.env.feed, date))
    found = {revision: info.key for info in listed if (revision := manifest_revision(info.key)) is not None}
    if not found:
        return False
    book = desk.book.book
    day = book.days.get(date)
    if day is not None and day.sealed is not None and day.sealed.revision >= max(found):
        return True
    claims = msgspec.json.decode(await desk.stores.raw.get(found[max(found)]), type=_Claims)
    if claims.env != desk.env:
        return False
    if day is None or claims.journal_seq > book.tip_seq:
        raise SsmdError(
            f"the journal is behind the store: {date} is sealed there as of event {claims.journal_seq}, and the journal "
            f"{'has no such day' if day is None else f'ends at event {book.tip_seq}'}",
            where=f"stream {desk.env}-day",
            do=f"Restore the streams {desk.env}-day and {desk.env}-secmaster from their backup",
        )
    return True
