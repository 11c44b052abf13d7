"""Named points at which a test lets this process die as a power cut would. Does nothing unless `SSMD_CRASH_AT` names one.

Every step of every verb has one before and one after it: `start.connector.before`, `end.record.after`, and so have taking
the day (`start.take.…`) and the verb's last event (`start.finish.…`).
"""

from __future__ import annotations

import os
import signal

VARIABLE = "SSMD_CRASH_AT"


def reached(point: str) -> None:
    """Kill this process here if `SSMD_CRASH_AT` names this point; SIGKILL runs no handler and no `finally`."""
    if os.environ.get(VARIABLE) == point:
        os.kill(os.getpid(), signal.SIGKILL)
