"""Names as tokens of subjects, and the reader of streams where servers and users misbehave."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ssmd_dagster.errors import NotFoundError
from ssmd_dagster.stores.connect import connect_nats
from ssmd_dagster.stores.jetstream import StreamReader, decode_token, encode_token
from ssmd_dagster_tests import servers

if TYPE_CHECKING:
    from pathlib import Path

    from nats.js import JetStreamContext


@given(st.text(st.characters(codec="utf-8"), min_size=1))
@example("KXBTCD-26FEB07-T98249.99")
@example("a b*c>d%2E")
def test_every_name_becomes_one_harmless_token(name: str) -> None:
    """Any text becomes a token of harmless characters and comes back as it was."""
    token = encode_token(name)
    assert re.fullmatch(r"[A-Za-z0-9_%-]+", token)
    assert decode_token(token) == name


def test_a_ticker_with_dots_is_encoded_as_the_contract_says() -> None:
    """Dots become %2E, letters, digits, - and _ stay."""
    assert encode_token("KXBTCD-26FEB07-T98249.99") == "KXBTCD-26FEB07-T98249%2E99"


async def put(js: JetStreamContext, subject: str, *payloads: str) -> None:
    """Publish texts one behind the other."""
    for payload in payloads:
        await js.publish(subject, payload.encode())


async def take(reader: StreamReader, count: int) -> list[str]:
    """Fetch exactly `count` messages as texts."""
    taken: list[str] = []
    async with asyncio.timeout(15):
        while len(taken) < count:
            taken += [message.data.decode() for message in await reader.fetch(1, count - len(taken))]
    return taken


async def test_a_deleted_consumer_is_replaced_without_loss_or_repetition(js: JetStreamContext, env_name: str) -> None:
    """When the server's consumer is taken away in the middle, reading goes on behind the last message."""
    await js.add_stream(name=env_name, subjects=[f"{env_name}.>"])
    await put(js, f"{env_name}.a", *map(str, range(20)))
    async with StreamReader(js, env_name, [f"{env_name}.>"], batch=4) as reader:
        assert await take(reader, 7) == [str(number) for number in range(7)]
        for consumer in await js.consumers_info(env_name):
            await js.delete_consumer(env_name, consumer.name)
        assert await take(reader, 13) == [str(number) for number in range(7, 20)]
        assert await reader.fetch(0.1) == []
        assert (await reader.backlog(), reader.rewinds) == (0, 0)


async def test_a_stream_made_anew_is_read_from_its_beginning(js: JetStreamContext, env_name: str) -> None:
    """Sequences that were given anew are not taken for those that were read before."""
    await js.add_stream(name=env_name, subjects=[f"{env_name}.>"])
    await put(js, f"{env_name}.a", "old-1", "old-2", "old-3")
    async with StreamReader(js, env_name, [f"{env_name}.>"]) as reader:
        assert await take(reader, 3) == ["old-1", "old-2", "old-3"]
        await js.delete_stream(env_name)
        await js.add_stream(name=env_name, subjects=[f"{env_name}.>"])
        await put(js, f"{env_name}.a", "new-1", "new-2", "new-3", "new-4")
        assert await take(reader, 4) == ["new-1", "new-2", "new-3", "new-4"]
        assert reader.rewinds == 1


async def test_backlog_counts_what_fetch_has_not_returned(js: JetStreamContext, env_name: str) -> None:
    """Messages of other subjects do not count, those on the way do."""
    await js.add_stream(name=env_name, subjects=[f"{env_name}.>"])
    await put(js, f"{env_name}.a", *map(str, range(10)))
    await put(js, f"{env_name}.b", "x", "y")
    async with StreamReader(js, env_name, [f"{env_name}.a"], batch=4) as reader:
        for left in range(10, 0, -1):
            assert await reader.backlog() == left
            assert await take(reader, 1) == [str(10 - left)]
        assert await reader.backlog() == 0
        assert await reader.fetch(0.1) == []
        await put(js, f"{env_name}.a", "new")
        assert await reader.backlog() == 1


async def test_a_cancelled_fetch_loses_nothing(js: JetStreamContext, env_name: str) -> None:
    """Deadlines of the caller may strike at any moment."""
    await js.add_stream(name=env_name, subjects=[f"{env_name}.>"])
    await put(js, f"{env_name}.a", *map(str, range(50)))
    taken: list[str] = []
    async with StreamReader(js, env_name, [f"{env_name}.>"], batch=5) as reader:
        for attempt in range(2000):
            try:
                async with asyncio.timeout(0.0002 * (attempt % 20)):
                    taken += [message.data.decode() for message in await reader.fetch(1, 3)]
            except TimeoutError:
                continue
            if len(taken) == 50:
                break
    assert taken == [str(number) for number in range(50)]


async def test_a_missing_stream_is_an_error(js: JetStreamContext, env_name: str) -> None:
    """A reader does not wait for a stream that nobody created."""
    async with StreamReader(js, env_name, [">"]) as reader:
        with pytest.raises(NotFoundError, match="no such stream"):
            await reader.fetch(1)


async def test_a_server_that_falls_silent_is_noticed(tmp_path: Path, env_name: str) -> None:
    """A server that stops without closing its sockets, and comes back, costs time and no message."""
    with servers.nats_server(tmp_path) as server:
        async with connect_nats(server.url, server.user, server.password, name="test") as nc:
            js = nc.jetstream(timeout=1)
            await js.add_stream(name=env_name, subjects=[f"{env_name}.>"])
            await put(js, f"{env_name}.a", "1")
            async with StreamReader(js, env_name, [f"{env_name}.>"]) as reader:
                assert await take(reader, 1) == ["1"]
                server.pause()
                assert await reader.fetch(3) == []
                server.resume()
                await put(js, f"{env_name}.a", "2")
                assert await take(reader, 1) == ["2"]
