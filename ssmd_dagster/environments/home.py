"""Where local state lives: the layout of `SSMD_HOME` and the folder of the YAML. The one place that knows either.

Functions that take `home` only compute paths; making the folders is up to those who write into them.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

from ssmd_dagster.errors import ConfigurationError

_PROJECT = Path(__file__).resolve().parents[2]


def project_dir() -> Path:
    """Return the folder that holds the package and `exchanges/`."""
    return _PROJECT


def ssmd_home() -> Path:
    """Return the absolute folder of all local state, `SSMD_HOME` or `.ssmd` in the project; made with mode 0700.

    Raises:
        ConfigurationError: It cannot be made, is no folder, or is open to other users.
    """
    home = Path(os.environ.get("SSMD_HOME") or _PROJECT / ".ssmd").expanduser().absolute()
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = home.stat().st_mode & 0o777
    except OSError as error:
        raise ConfigurationError(
            f"the folder of local state cannot be made: {error.strerror}",
            where=str(home),
            do="Set SSMD_HOME to a folder that you may write to",
        ) from error
    if mode & 0o077:
        raise ConfigurationError(
            f"the folder of local state is open to other users (mode {mode:04o})",
            where=str(home),
            do=f"Run: chmod 700 {home}",
        )
    return home


def exchanges_dir() -> Path:
    """Return the absolute folder of feeds, schemas and environments, `SSMD_EXCHANGES` or the project's `exchanges`."""
    return Path(os.environ.get("SSMD_EXCHANGES") or _PROJECT / "exchanges").expanduser().absolute()


def stack_file(home: Path) -> Path:
    """Return the file with ports and addresses of the running embedded stack."""
    return home / "stack.json"


def secrets_file(home: Path) -> Path:
    """Return the file with credentials, mode 0600."""
    return home / "secrets.env"


def supervisor_dir(home: Path) -> Path:
    """Return the folder of supervisord's socket, configuration and pid."""
    return home / "supervisor"


def nats_dir(home: Path) -> Path:
    """Return the folder of the embedded NATS server."""
    return home / "nats"


def cache_dir(home: Path) -> Path:
    """Return the folder of the embedded Redis."""
    return home / "cache"


def dagster_dir(home: Path) -> Path:
    """Return what `DAGSTER_HOME` is set to."""
    return home / "dagster"


def runs_dir(home: Path) -> Path:
    """Return the folder of the files that the processes of Dagster's runs hold locked."""
    return home / "runs"


def simulator_dir(home: Path, env: str) -> Path:
    """Return the folder of an environment's simulated exchange: clock, truth log, private key."""
    return home / "simulator" / env


def spool_root(home: Path) -> Path:
    """Return the folder that holds all environments' spools."""
    return home / "spool"


def spool_dir(home: Path, env: str, day: date | str) -> Path:
    """Return the folder of a day's spool files, `{conn}.batches`."""
    return spool_root(home) / env / str(day)


def segments_dir(home: Path, env: str, day: date | str) -> Path:
    """Return the folder of the archiver's disposable files of a day."""
    return home / "segments" / env / str(day)


def objects_dir(home: Path) -> Path:
    """Return the folder of the local object store; its buckets are folders in it."""
    return home / "objects"


def logs_dir(home: Path) -> Path:
    """Return the folder of the processes' logs."""
    return home / "logs"


def gateway_file(home: Path, env: str) -> Path:
    """Return the file in which an environment's gateway keeps the port that it listens on."""
    return home / "gateways" / env
