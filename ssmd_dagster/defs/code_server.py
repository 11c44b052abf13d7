"""Dagster's code server with a guard: `python -m ssmd_dagster.defs.code_server start …`, with Dagster's own options.

Dagster's server passes every question on to a child that holds the code. Where that child is killed, for its memory say, the
server goes on listening and can answer nothing: no sensor, no schedule and no run until somebody reloads. Here it ends then, and
its supervisor starts it again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator

import psutil
from dagster._cli.code_server import code_server_cli

LOOK_EVERY_S = 3.0


def main() -> None:
    """Run Dagster's command line of a code server beside the guard."""
    threading.Thread(target=_guard, name="guard", daemon=True).start()
    code_server_cli(prog_name="code_server")


def wait_until_gone(looks: Iterable[bool]) -> None:
    """Return once what was seen there is not there in two looks in a row: a server that is being stopped is not guarded."""
    was_there, missed = False, 0
    for is_there in looks:
        was_there |= is_there
        missed = 0 if is_there else missed + 1
        if was_there and missed == 2:
            return


def _guard() -> None:
    wait_until_gone(_looks())
    print("the process that holds the code is gone; ending, to be started again", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(1)


def _looks() -> Iterator[bool]:
    """Yield whether there is a child that holds the code. A reload starts the new one before it ends the old one."""
    this = psutil.Process()
    while True:
        time.sleep(LOOK_EVERY_S)
        yield any(_holds_code(child) for child in this.children())


def _holds_code(process: psutil.Process) -> bool:
    try:
        return "grpc" in process.cmdline()  # that of a process that was killed and not yet reaped is empty
    except psutil.Error:
        return False


if __name__ == "__main__":
    main()
