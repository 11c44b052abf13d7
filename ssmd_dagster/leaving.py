"""How a process of ours ends: at once, with everything that it printed. Not for what its exit code means.

Finalising the interpreter is left out: the threads of the object store's client may still be at the point of handing over a
result then, and Python before 3.13 ends such a thread in a way that aborts the whole process (PyO3's pull request 4874): a
command that had done its work exited with 134 instead of its own code, at random.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with an exit code; nothing but the standard streams and the log is flushed."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # nobody reads it, it is closed, there is none
            stream.flush()
    os._exit(code)
