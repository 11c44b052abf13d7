"""Named points at which a test lets this process die as a power cut would. Does nothing unless `SSMD_CRASH_AT` names one.

Every step of every verb has one before and one after it: `start.connector.before`, `end.record.after`, and so have taking
the day (`start.take.…`) and the verb's last event (`start.finish.…`). The archiver's (`archiver.put.after`, …) stand where it
stores a segment. For a process that its supervisor starts again, `SSMD_CRASH_FILE` names a file with the point: whoever
reaches it removes the file and dies, once.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

VARIABLE = "SSMD_CRASH_AT"
FILE_VARIABLE = "SSMD_CRASH_FILE"


# A process is told when it is started; these stand in places that are passed thousands of times a second.
_AT = os.environ.get(VARIABLE)
_FILE = os.environ.get(FILE_VARIABLE)


def reached(point: str) -> None:
    """Kill this process here if this point is named; SIGKILL runs no handler and no `finally`."""
    if point == _AT or (_FILE is not None and _named_in_file(point, Path(_FILE))):
        os.kill(os.getpid(), signal.SIGKILL)


def _named_in_file(point: str, path: Path) -> bool:
    try:
        if path.read_text(encoding="utf-8") != point:
            return False
        path.unlink()
    except FileNotFoundError:
        return False
    return True
