"""Runs inside supervisord: makes final exit codes final however soon they come, and keeps those of quick deaths.

supervisord itself calls every end within `startsecs` a failed start, tries it again and forgets the code: a connector
with refused credentials (exit 8 after half a second) would knock at the exchange ten more times. Loaded through the
`[rpcinterface]` section, the extension point that supervisord offers; not for anything else.
"""

from __future__ import annotations

from typing import Any

from supervisor import process
from supervisor.options import decode_wait_status


class _NoMethods:
    """supervisord wants an object whose public methods it can offer over XML-RPC; there are none."""


def make_rpcinterface(supervisord: Any) -> _NoMethods:
    """Install the behaviour in this supervisord, once; called when it starts (and never on a reload)."""
    original = process.Subprocess.finish

    def finish(self: Any, pid: int, status: int) -> None:
        code, _ = decode_wait_status(status)
        start_seconds = self.config.startsecs
        if code in self.config.exitcodes:
            self.config.startsecs = 0
        try:
            original(self, pid, status)
        finally:
            self.config.startsecs = start_seconds
        if self.exitstatus is None:
            self.exitstatus = code

    process.Subprocess.finish = finish
    return _NoMethods()
