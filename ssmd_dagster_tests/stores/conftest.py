"""Clients of the shared servers, one per test."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import pytest
import redis.asyncio

from ssmd_dagster.stores.connect import connect_nats, connect_redis

if TYPE_CHECKING:
    from nats.js import JetStreamContext

    from ssmd_dagster_tests.servers import NatsServer, ValkeyServer


@pytest.fixture
async def js(nats: NatsServer) -> AsyncIterator[JetStreamContext]:
    """JetStream of the shared NATS server."""
    async with connect_nats(nats.url, nats.user, nats.password, name="test") as nc:
        yield nc.jetstream()


@pytest.fixture
async def redis_client(valkey: ValkeyServer) -> AsyncIterator[redis.asyncio.Redis]:
    """A client of the shared Valkey server."""
    async with connect_redis(valkey.url, valkey.password, name="test") as client:
        yield client
