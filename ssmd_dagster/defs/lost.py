"""Runs that Dagster counts as running although their process is gone, as after a power cut.

Dagster's launcher of one host sees the end of a run only from the code server that started it. Where both die, the run would
stand in its lane until `dagster/max_runtime`, and nothing else could run there. So each run's process holds a locked file; the
kernel lets go of the lock with the process, however it ends. What a lost run leaves of its day is `run_ended`'s.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path

import dagster as dg

from ssmd_dagster.environments.home import runs_dir

GRACE_S = 60.0
"""How long a run that has begun is given to lock its file; a file that nobody locks is removed after as long."""
MOST_RUNS = 250

_HELD: dict[str, int] = {}
"""Kept open until the process ends: a run whose file was let go earlier would look lost just before it says that it is done."""


def hold(home: Path, run_id: str) -> None:
    """Show, until this process ends, that the run is alive; does nothing where it shows that already."""
    if run_id in _HELD:
        return
    folder = runs_dir(home)
    folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(folder / run_id, os.O_CREAT | os.O_RDWR, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    _HELD[run_id] = descriptor


def fail_lost_runs(instance: dg.DagsterInstance, home: Path) -> list[str]:
    """Fail the environments' runs whose process is gone, and say which; remove the files of runs that are over."""
    alive = {path.name for path in _files(home) if not _let_go(path)}
    began_before = time.time() - GRACE_S
    said = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]), limit=MOST_RUNS):
        run = record.dagster_run
        if "ssmd/environment" not in run.tags or run.run_id in alive or (record.start_time or 0.0) > began_before:
            continue
        instance.report_run_failed(
            run, "Its process is gone: killed together with its code server, or with the machine."
        )
        said.append(
            f"the process of {run.job_name} {run.tags.get('dagster/partition', '')} (run {run.run_id[:8]}) is gone"
        )
    return said


def _files(home: Path) -> list[Path]:
    return list(runs_dir(home).iterdir()) if runs_dir(home).is_dir() else []


def _let_go(path: Path) -> bool:
    """Say whether nobody holds a file that is not new, and remove it then."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if os.fstat(file.fileno()).st_mtime > time.time() - GRACE_S:
            return False
        path.unlink()
    return True
