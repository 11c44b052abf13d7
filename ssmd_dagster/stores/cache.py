"""The cache of an environment's days in Redis: state for quick reading, leases and heartbeats.

Not the truth: every key of a day can be emptied and is rebuilt from the journal. It decides nothing; in particular,
that a Redis which cannot be reached counts as a held lease is the caller's rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import msgspec
import redis.asyncio
import redis.exceptions

from ssmd_dagster.day.calendar import Window
from ssmd_dagster.day.events import Book, TradingDay
from ssmd_dagster.day.states import DayState
from ssmd_dagster.errors import ConfigurationError, SsmdError, UnreachableError
from ssmd_dagster.stores.folded import Folded, pack, unpack

LEASE_TTL_S = 30.0
HEARTBEAT_TTL_S = 15
LAST_WORDS_TTL_S = 86_400

# ARGV: prefix "{env}:day:", "1" to empty the days first, sequence of the book, sequence from which on the days given
# are complete, current date or "", number of days, then per day: date, last sequence, state, epoch, start_time,
# end_time, stats; "" is no value. Returns 1 applied, 0 older than what is there, -1 the cache lacks days that were not
# given.
# Leases are left alone: they are nobody's state, but who works.
_APPLY = """
local prefix, empty, seq, base = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if empty == '1' then
  local cursor = '0'
  repeat
    local page = redis.call('SCAN', cursor, 'MATCH', prefix .. '*', 'COUNT', 1000)
    cursor = page[1]
    for _, key in ipairs(page[2]) do
      if string.sub(key, -6) ~= ':lease' then redis.call('DEL', key) end
    end
  until cursor == '0'
end
local applied = tonumber(redis.call('GET', prefix .. 'applied_seq') or '0')
if empty ~= '1' then
  if applied >= seq then return 0 end
  if applied < base then return -1 end
end
-- The capture's own counts of a running day stand until the journal knows of more: the greater of the two, so that the
-- order in which books arrive does not matter. They are not written anew from what cjson reads: it has no 64-bit
-- integers.
local function newer(key, stats)
  local held = redis.call('GET', key)
  if not held then return true end
  local a, b = cjson.decode(held), cjson.decode(stats)
  return a.messages < b.messages or (a.messages == b.messages and a.gaps < b.gaps)
end
local running = {STARTING = true, ACTIVE = true, ENDING = true, ERROR = true}
local function put(key, value)
  if value == '' then redis.call('DEL', key) else redis.call('SET', key, value) end
end
put(prefix .. 'current', ARGV[5])
local at = 7
for _ = 1, tonumber(ARGV[6]) do
  if tonumber(ARGV[at + 1]) > applied then
    local day = prefix .. ARGV[at] .. ':'
    put(day .. 'state', ARGV[at + 2])
    put(day .. 'epoch', ARGV[at + 3])
    put(day .. 'start_time', ARGV[at + 4])
    put(day .. 'end_time', ARGV[at + 5])
    if not running[ARGV[at + 2]] or newer(day .. 'stats', ARGV[at + 6]) then put(day .. 'stats', ARGV[at + 6]) end
  end
  at = at + 7
end
redis.call('SET', prefix .. 'applied_seq', ARGV[3])
return 1
"""

_ACQUIRE = """
local holder = redis.call('GET', KEYS[1])
if holder and holder ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""

_RENEW = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
"""

_RELEASE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])
"""

_STATE_OF_SERVER = ("MISCONF", "OOM", "READONLY", "LOADING", "CLUSTERDOWN", "MASTERDOWN", "TRYAGAIN")


class DayStats(msgspec.Struct, frozen=True, kw_only=True):
    """The key `{env}:day:{date}:stats`. `last_message_ns` is 0 before the first message."""

    messages: int = 0
    gaps: int = 0
    bytes: int = 0
    by_channel: dict[str, int] = {}
    last_message_ns: int = 0
    lag_ms: float = 0.0


@contextmanager
def redis_errors(
    client: redis.asyncio.Redis, *, do: str = "Check that Redis runs (`ssmd up` where it is embedded)"
) -> Iterator[None]:
    """Turn errors of redis-py into ours.

    Raises:
        UnreachableError: No answer, or the server says that it cannot serve now; names host and port.
        ConfigurationError: The password is missing or refused.
        SsmdError: Another answer than was expected, or a value that cannot be read.
    """
    options = client.connection_pool.connection_kwargs
    where = f"Redis at {options.get('host', 'localhost')}:{options.get('port', 6379)}"
    try:
        yield
    except (
        redis.exceptions.AuthenticationError,
        redis.exceptions.AuthenticationWrongNumberOfArgsError,
        redis.exceptions.NoPermissionError,
    ) as error:
        raise ConfigurationError(f"access refused: {error}", where=where, do="Check the password of Redis") from error
    except (redis.exceptions.ConnectionError, redis.exceptions.TimeoutError, OSError) as error:
        raise UnreachableError(f"no answer: {str(error) or 'none in time'}", where=where, do=do) from error
    except redis.exceptions.ResponseError as error:
        if str(error).startswith(_STATE_OF_SERVER) or isinstance(error, redis.exceptions.ReadOnlyError):
            raise UnreachableError(f"cannot serve: {error}", where=where, do="Look after the server") from error
        raise SsmdError(f"unexpected answer: {error}", where=where) from error
    except msgspec.DecodeError as error:
        do = "Empty the cache; `ssmd day rebuild` and `ssmd secmaster sync` write it anew"
        raise SsmdError(f"holds what cannot be read: {error}", where=where, do=do) from error


def text(answer: Any) -> str:
    """Return a text that Redis answered with: redis-py's types leave open whether it decodes, our clients do not."""
    assert isinstance(answer, bytes)
    return answer.decode()


def rfc3339(at_ns: int) -> str:
    """Return `2025-12-14T00:10:00Z`; a fraction only where there is one."""
    seconds, fraction_ns = divmod(at_ns, 1_000_000_000)
    text = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{text}.{fraction_ns:09d}".rstrip("0") + "Z" if fraction_ns else f"{text}Z"


class DayCache:
    """The keys `{env}:day:…`, `{env}:capture:…` and `{env}:maintenance` of one environment.

    Every method raises UnreachableError when Redis does not answer, ConfigurationError when it refuses the password.
    """

    def __init__(self, client: redis.asyncio.Redis, env: str) -> None:
        self._redis = client
        self._days = f"{env}:day:"
        self._capture = f"{env}:capture:"
        self._maintenance = f"{env}:maintenance"
        self._apply = client.register_script(_APPLY)
        self._acquire = client.register_script(_ACQUIRE)
        self._renew = client.register_script(_RENEW)
        self._release = client.register_script(_RELEASE)

    async def apply(self, book: Book) -> bool:
        """Bring the days' keys to the state of `book`; False if they reflect that sequence or a later one already.

        Whatever the order in which several books arrive, the keys end up as the latest one has them. The `stats` of a
        running day, which the capture keeps up to date, are left alone unless the journal knows of more.
        """
        with redis_errors(self._redis):
            base = int(await self._redis.get(f"{self._days}applied_seq") or 0)
            answer = await self._run(book, base)
            if answer == -1:  # emptied in between
                answer = await self._run(book, 0)
        return answer == 1

    async def rebuild(self, book: Book) -> None:
        """Empty all keys of the days, leases excepted, and write them from `book`, whatever sequence they reflected.

        Read the journal again afterwards and `apply` it: somebody may have appended since `book` was read.
        """
        with redis_errors(self._redis):
            await self._run(book, 0, empty=True)

    async def _run(self, book: Book, base: int, *, empty: bool = False) -> int:
        days = [day for day in book.days.values() if day.last_seq > base]
        head = [self._days, "1" if empty else "0", book.tip_seq, base, book.current or "", len(days)]
        answer: int = await self._apply(args=[*head, *(field for day in days for field in _fields(day))])
        return answer

    async def applied_seq(self) -> int:
        """Return the journal sequence that the keys reflect; 0 for an empty cache."""
        return int(await self._get("applied_seq") or 0)

    async def current(self) -> str | None:
        """Return the date of the current trading day."""
        return await self._get("current")

    async def state(self, date: str) -> DayState | None:
        """Return the state of a day, None if the cache does not know it."""
        state = await self._get(f"{date}:state")
        return None if state is None else DayState(state)

    async def epoch(self, date: str) -> int | None:
        """Return the epoch of a day, None if it has none or the cache does not know it."""
        epoch = await self._get(f"{date}:epoch")
        return None if epoch is None else int(epoch)

    async def _get(self, key: str) -> str | None:
        with redis_errors(self._redis):
            value = await self._redis.get(f"{self._days}{key}")
        return None if value is None else text(value)

    async def put_folded(self, book: Book, tip_sha256: str) -> None:
        """Keep the fold of the journal up to `book.tip_seq`, whose event has the SHA-256 `tip_sha256`."""
        with redis_errors(self._redis):
            await self._redis.set(f"{self._days}folded", pack(book, tip_sha256))

    async def folded(self) -> Folded | None:
        """Return the fold that was kept, None if there is none that this code can use. It is to be held against the journal."""
        with redis_errors(self._redis):
            value = await self._redis.get(f"{self._days}folded")
        return unpack(value) if isinstance(value, bytes) else None

    async def put_stats(self, date: str, stats: DayStats) -> None:
        """Write a day's statistics."""
        with redis_errors(self._redis):
            await self._redis.set(f"{self._days}{date}:stats", msgspec.json.encode(stats))

    async def stats(self, date: str) -> DayStats | None:
        """Return a day's statistics, None if there are none."""
        with redis_errors(self._redis):
            value = await self._redis.get(f"{self._days}{date}:stats")
        return None if value is None else msgspec.json.decode(value, type=DayStats)

    async def put_heartbeat(self, date: str, component: str, beat: Mapping[str, Any]) -> None:
        """Write a component's heartbeat; it is gone after 15 s.

        One with an `exit_code`, which only a person can mend, says for a day why the component is not there any more.
        """
        ttl_s = HEARTBEAT_TTL_S if beat.get("exit_code") is None else LAST_WORDS_TTL_S
        with redis_errors(self._redis):
            await self._redis.set(f"{self._capture}{date}:{component}", msgspec.json.encode(beat), ex=ttl_s)

    async def heartbeat(self, date: str, component: str) -> dict[str, Any] | None:
        """Return a component's heartbeat, None if it has expired."""
        with redis_errors(self._redis):
            value = await self._redis.get(f"{self._capture}{date}:{component}")
        return None if value is None else msgspec.json.decode(value, type=dict[str, Any])

    async def heartbeats(self, date: str) -> dict[str, dict[str, Any]]:
        """Return the live heartbeats of a day by component, sorted by name."""
        prefix = f"{self._capture}{date}:"
        with redis_errors(self._redis):
            keys = sorted([key async for key in self._redis.scan_iter(match=f"{prefix}*", count=1000)])
            values = await self._redis.mget(keys) if keys else []
        return {
            text(key).removeprefix(prefix): msgspec.json.decode(value, type=dict[str, Any])
            for key, value in zip(keys, values, strict=True)
            if value is not None
        }

    async def remove_heartbeat(self, date: str, component: str) -> None:
        """Take a component's heartbeat away, as one that ends in order does."""
        with redis_errors(self._redis):
            await self._redis.delete(f"{self._capture}{date}:{component}")

    async def put_maintenance(self, windows: Sequence[Window]) -> None:
        """Write what the exchange has announced of its maintenance."""
        with redis_errors(self._redis):
            await self._redis.set(self._maintenance, msgspec.json.encode(windows))

    async def maintenance(self) -> tuple[Window, ...]:
        """Return what the exchange has announced of its maintenance, as far as anybody has asked."""
        with redis_errors(self._redis):
            value = await self._redis.get(self._maintenance)
            return () if value is None else msgspec.json.decode(value, type=tuple[Window, ...])

    async def acquire(self, date: str, owner: str, ttl_s: float = LEASE_TTL_S) -> bool:
        """Take or renew the lease of a day; False if somebody else has it."""
        return await self._lease(self._acquire, date, owner, ttl_s)

    async def renew(self, date: str, owner: str, ttl_s: float = LEASE_TTL_S) -> bool:
        """Renew the lease; False if `owner` does not hold it (any more): it must then stop acting on the day."""
        return await self._lease(self._renew, date, owner, ttl_s)

    async def release(self, date: str, owner: str) -> bool:
        """Give the lease back; False if `owner` did not hold it."""
        return await self._lease(self._release, date, owner, 0)

    async def holder(self, date: str) -> str | None:
        """Return who holds the lease of a day, None if nobody does."""
        return await self._get(f"{date}:lease")

    async def _lease(self, script: Any, date: str, owner: str, ttl_s: float) -> bool:
        with redis_errors(self._redis):
            answer: int = await script(keys=[f"{self._days}{date}:lease"], args=[owner, int(ttl_s * 1000)])
        return answer == 1


def _fields(day: TradingDay) -> Iterable[str | int | bytes]:
    stats = DayStats(messages=day.messages or 0, gaps=len(day.gaps))
    return (
        day.date,
        day.last_seq,
        day.state.value,
        "" if day.epoch is None else day.epoch,
        "" if day.started_ns is None else rfc3339(day.started_ns),
        "" if day.ended_ns is None else rfc3339(day.ended_ns),
        msgspec.json.encode(stats),
    )
