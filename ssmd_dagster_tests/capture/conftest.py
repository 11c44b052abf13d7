"""Settings over the shared servers: an environment of its own for each test, its stores open, its day ACTIVE."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from ssmd_dagster.capture.setting import Setting
from ssmd_dagster.day.states import EventName
from ssmd_dagster.environments.home import project_dir
from ssmd_dagster.environments.loader import load_registry
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.stores.connect import Stores, connect
from ssmd_dagster.stores.daybook import DayBook
from ssmd_dagster_tests.capture.recordings import DATE, TickingClock
from ssmd_dagster_tests.servers import NatsServer, ValkeyServer

MakeSetting = Callable[..., Setting]


@pytest.fixture
def make_setting(tmp_path: Path, nats: NatsServer, valkey: ValkeyServer, env_name: str) -> MakeSetting:
    """Makes a setting of this test's environment for one host: a home of its own, servers and object store in common."""

    def make(host: str = "host", *, nats_url: str | None = None, **capture: Any) -> Setting:
        home = tmp_path / host
        home.mkdir(mode=0o700, exist_ok=True)
        env = Environment.model_validate(
            {
                "name": env_name,
                "feed": "kalshi",
                "auth_method": "none",
                "schema": "trade:v1",
                "first_day": date(2025, 12, 1),
                "schedule": {"timezone": "UTC", "day_start": "00:10", "day_end": "00:00"},
                "capture": {"channels": ["trade"], "markets": {"all": True}, **capture},
                "keys": {
                    "nats": {"source": "env", "fields": {"user": "N_USER", "password": "N_PASSWORD"}},
                    "redis": {"source": "env", "fields": {"password": "R_PASSWORD"}},
                },
                "transport": {"type": "nats", "url": nats_url or nats.url},
                "cache": {"type": "redis", "url": valkey.url},
                "storage": {
                    "type": "local",
                    "path": str(tmp_path / "objects"),
                    "buckets": {"raw": "ssmd-raw", "normalized": "ssmd-normalized"},
                },
            }
        )
        env.bind(load_registry(project_dir() / "exchanges").feeds["kalshi"])
        secrets = {"N_USER": nats.user, "N_PASSWORD": nats.password, "R_PASSWORD": valkey.password}
        return Setting(env, home, secrets, TickingClock())  # type: ignore[arg-type]

    return make


@pytest.fixture
def setting(make_setting: MakeSetting) -> Setting:
    """The setting of this test's environment."""
    return make_setting()


@pytest.fixture
async def stores(setting: Setting) -> AsyncIterator[Stores]:
    """Open stores, with the raw stream and the journal created."""
    async with connect(setting.env, setting.home, setting.secrets, name="test") as stores:
        await stores.journal.create()
        await stores.raw_stream.create(64 << 20)
        yield stores
        await stores.js.delete_stream(stores.raw_stream.stream)


@pytest.fixture
async def book(setting: Setting, stores: Stores) -> DayBook:
    """The day book of an environment whose day is ACTIVE."""
    book = DayBook(setting.env.name, stores.journal, stores.cache, setting.clock, "test")
    await book.append(DATE, EventName.DEFINED)
    await book.append(DATE, EventName.START_REQUESTED, data={"mode": "live"})
    await book.append(DATE, EventName.STARTED, data={})
    return book
