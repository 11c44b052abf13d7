"""What a process or a verb is given of one environment: its configuration, local home, secrets, clock and exchange."""

from __future__ import annotations

from datetime import date as Date  # noqa: N812 - `date` is the contract's word for the written form
from pathlib import Path

import msgspec

from ssmd_dagster.clock import Clock, ShiftedClock, system_clock
from ssmd_dagster.environments.home import simulator_dir, ssmd_home
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.environments.secrets import Secrets, load_secrets
from ssmd_dagster.errors import ConfigurationError, UnreachableError
from ssmd_dagster.exchange import Exchange, ExchangeSettings, open_exchange
from ssmd_dagster.stores.connect import read_stack


class Setting(msgspec.Struct, frozen=True):
    """One environment as a process sees it."""

    env: Environment
    home: Path
    secrets: Secrets
    clock: Clock

    def __repr__(self) -> str:
        return f"Setting({self.env.name}, {self.home})"

    def exchange_settings(self, date: str) -> ExchangeSettings:
        """Return how the exchange is reached on a day, with the addresses of the running simulator where it is one.

        Raises:
            ConfigurationError: A credential is missing or its file cannot be read.
            UnreachableError: The simulator does not run.
        """
        version = self.env.feed_version(Date.fromisoformat(date))
        endpoint, rest_endpoint = version.endpoint, version.rest_endpoint
        if self.env.simulator is not None:
            address = read_stack(self.home).simulators.get(self.env.name)
            if address is None:
                raise UnreachableError(
                    "the simulated exchange does not run", where=str(self.home), do=f"Run `ssmd up {self.env.name}`."
                )
            endpoint, rest_endpoint = address.endpoint, address.rest_endpoint
        key_id, private_key_pem = None, None
        if version.auth_method == "api_key":
            key_id = self.env.secret(self.env.feed, "key_id", self.secrets)
            private_key_pem = _read_key(Path(self.env.secret(self.env.feed, "private_key_path", self.secrets)))
        return ExchangeSettings(
            environment=self.env.name,
            endpoint=endpoint,
            rest_endpoint=rest_endpoint,
            rate_limit_per_second=version.rate_limit_per_second,
            max_symbols_per_connection=version.max_symbols_per_connection,
            key_id=key_id,
            private_key_pem=private_key_pem,
        )

    def open_exchange(self, date: str) -> Exchange:
        """Open the exchange for a day; call inside a running event loop, and close it."""
        return open_exchange(self.env.feed, self.exchange_settings(date), self.clock)


def clock_path(home: Path, env: str) -> Path:
    """Return the file in which a simulated exchange keeps how far its clock is moved."""
    return simulator_dir(home, env) / "clock.json"


def load_setting(env_name: str) -> Setting:
    """Load an environment with its secrets and clock from `SSMD_HOME` and `SSMD_EXCHANGES`."""
    home = ssmd_home()
    env = load_registry().get(env_name)
    clock = ShiftedClock(clock_path(home, env.name)) if env.simulator is not None else system_clock
    return Setting(env, home, load_secrets(home), clock)


def _read_key(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigurationError(
            f"the exchange's private key cannot be read: {error.strerror}",
            where=str(path),
            do="Correct the variable that names its path, or the file's rights.",
        ) from error
