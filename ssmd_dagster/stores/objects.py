"""The object store: one small port over a local folder and S3, where an object is written once and never changed.

Not for what the keys mean (`archive.layout`) nor for what to do when an object exists already: that is the writer's
rule.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from hashlib import sha256
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import obstore
import obstore.exceptions
from obstore.store import LocalStore, S3Store

from ssmd_dagster.crash_points import reached
from ssmd_dagster.environments.models import Environment
from ssmd_dagster.errors import ConfigurationError, NotFoundError, SsmdError, UnreachableError

if TYPE_CHECKING:
    from obstore.store import S3Config

_KEY = re.compile(r"(?!\.)[A-Za-z0-9_.%=-]+(/(?!\.)[A-Za-z0-9_.%=-]+)*")
_STATUS = re.compile(r"status code: (\d{3})")
_PASSING_STATUSES = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.CONFLICT, HTTPStatus.TOO_MANY_REQUESTS})
_INCOMING = ".incoming"
_CHUNK_BYTES = 8 * 1024 * 1024
_REQUEST_TIMEOUT_S = 120.0
_LARGE_BYTES = 96 * 1024 * 1024
"""More than a segment has; a day's tables may have more by far, and go in parts."""
_CONFIGURATION_ERRNOS = frozenset({1, 13, 30})
"""EPERM, EACCES, EROFS."""


class ObjectExistsError(SsmdError):
    """There is an object of this key already; nothing was written."""


class StorageError(SsmdError):
    """The local disk failed: full, or broken."""

    transient = True


class ObjectInfo(NamedTuple):
    """An object's key and size in bytes."""

    key: str
    size: int


class ObjectStore(ABC):
    """One bucket. Keys are `/`-separated names of letters, digits and `_.%=-`, none of them beginning with a dot.

    Every method raises UnreachableError when the service does not answer or fails (transient), ConfigurationError when
    access is refused or the bucket is missing, StorageError when a local disk fails.
    """

    def __init__(self, store: LocalStore | S3Store, where: str) -> None:
        self._store = store
        self._where = where

    @abstractmethod
    async def create(self, key: str, content: bytes | Path) -> None:
        """Write an object (the bytes, or those of a local file); when this returns it is whole and durable.

        Raises:
            ObjectExistsError: There is one of that key already. After a lost answer it can be one's own.
        """

    @abstractmethod
    def url(self, key: str) -> str:
        """Return where an object, or a folder `…/`, is found: an absolute path, or `s3://bucket/…`."""

    async def get(self, key: str) -> bytes:
        """Return an object's bytes.

        Raises:
            NotFoundError: There is no such object.
        """
        with self._errors(key):
            answer = await obstore.get_async(self._store, _checked(key))
            return bytes(await answer.bytes_async())

    async def get_range(self, key: str, start: int, length: int) -> bytes:
        """Return `length` bytes of an object from `start` on, fewer where it ends before.

        Raises:
            NotFoundError: There is no such object.
        """
        with self._errors(key):
            return bytes(await obstore.get_range_async(self._store, _checked(key), start=start, length=length))

    async def stream(self, key: str, chunk_bytes: int = _CHUNK_BYTES) -> AsyncIterator[bytes]:
        """Yield an object's bytes in chunks of about `chunk_bytes`.

        Raises:
            NotFoundError: There is no such object.
        """
        with self._errors(key):
            answer = await obstore.get_async(self._store, _checked(key))
            async for chunk in answer.stream(min_chunk_size=chunk_bytes):
                yield bytes(chunk)

    async def head(self, key: str) -> int:
        """Return an object's size in bytes.

        Raises:
            NotFoundError: There is no such object.
        """
        with self._errors(key):
            return (await obstore.head_async(self._store, _checked(key)))["size"]

    async def list(self, folder: str = "") -> list[ObjectInfo]:
        """Return all objects below a folder (`kalshi/2025/12/14/`), sorted by key; none if it is not there."""
        if folder:
            _checked(folder.rstrip("/"))
        found: list[ObjectInfo] = []
        with self._errors(folder):
            async for page in obstore.list(self._store, prefix=folder or None):
                found += (ObjectInfo(item["path"], item["size"]) for item in page)
        return sorted(info for info in found if not info.key.startswith(f"{_INCOMING}/"))

    @contextmanager
    def _errors(self, key: str) -> Iterator[None]:
        where = f"{self._where}/{key}"
        try:
            yield
        except obstore.exceptions.AlreadyExistsError as error:
            raise ObjectExistsError("the object exists already", where=where) from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise ConfigurationError(
                    "the bucket does not exist", where=where, do="Create it, or correct storage.buckets"
                ) from error
            raise NotFoundError("no such object", where=where) from error
        except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
            raise ConfigurationError(
                "access refused", where=where, do="Check the credentials and rights of the store"
            ) from error
        except (obstore.exceptions.BaseError, ValueError) as error:
            raise self._classified(error, where) from error

    def _classified(self, error: Exception, where: str) -> SsmdError:
        status = _STATUS.search(str(error))
        return _refused(int(status[1]) if status is not None else 0, str(error).partition("\n")[0], where)


class LocalObjectStore(ObjectStore):
    """A bucket that is a local folder; it is made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._numbers = itertools.count()
        with _disk_errors(self._folder):
            _make_folder(self._folder / _INCOMING)
        super().__init__(LocalStore(self._folder), str(self._folder))

    async def create(self, key: str, content: bytes | Path) -> None:
        """Write an object; see `ObjectStore.create`. A file is copied."""
        await asyncio.to_thread(self._create, _checked(key), content)

    def _create(self, key: str, content: bytes | Path) -> None:
        # obstore's own put is atomic, but flushes neither the file nor its folder to the disk.
        target = self._folder / key
        name = sha256(key.encode()).hexdigest()[:32]
        temporary = self._folder / _INCOMING / f"{name}.{os.getpid()}.{next(self._numbers)}"
        with _disk_errors(target):
            self._remove_leftovers(name)
            try:
                _write_durably(temporary, content)
                reached("objects.create.written")
                _make_folder(target.parent)
                try:
                    os.link(temporary, target)
                except FileExistsError as error:
                    # Whoever wrote it may have been killed before this line; the object must stay once it was seen.
                    _sync_folder(target.parent)
                    raise ObjectExistsError("the object exists already", where=str(target)) from error
                reached("objects.create.linked")
                _sync_folder(target.parent)
            finally:
                temporary.unlink(missing_ok=True)

    def _remove_leftovers(self, name: str) -> None:
        """Remove what writers of the same object left behind when they were killed."""
        for leftover in (self._folder / _INCOMING).glob(f"{name}.*"):
            if not _lives(int(leftover.name.split(".")[1])):
                leftover.unlink(missing_ok=True)

    def url(self, key: str) -> str:
        """Return the absolute path."""
        return f"{self._folder}/{key}"

    def _classified(self, error: Exception, where: str) -> SsmdError:
        return StorageError(str(error).partition("\n")[0], where=where, do="Check the disk")


class S3ObjectStore(ObjectStore):
    """A bucket of S3 or of a service that speaks its protocol, conditional writes included."""

    def __init__(
        self,
        bucket: str,
        *,
        region: str,
        endpoint: str | None = None,
        prefix: str = "",
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
    ) -> None:
        config: S3Config = {"region": region, "checksum_algorithm": "SHA256"}
        if endpoint is not None:
            config["endpoint"] = endpoint
        if access_key_id is not None and secret_access_key is not None:
            config["access_key_id"] = access_key_id
            config["secret_access_key"] = secret_access_key

        store = S3Store(
            bucket,
            prefix=prefix or None,
            config=config,
            client_options={
                "allow_http": endpoint is not None and endpoint.startswith("http://"),
                "connect_timeout": "3s",
                "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
            },
            retry_config={
                "max_retries": 3,
                "retry_timeout": timedelta(seconds=20),
                "backoff": {
                    "init_backoff": timedelta(milliseconds=100),
                    "max_backoff": timedelta(seconds=2),
                    "base": 2,
                },
            },
        )
        self._bucket, self._prefix = bucket, f"{prefix}/" if prefix else ""
        self._client: dict[str, Any] = {
            "region": region,
            "endpoint": endpoint,
            "access_key_id": access_key_id,
            "secret_access_key": secret_access_key,
        }
        self._url = f"s3://{bucket}/{self._prefix}"
        super().__init__(store, f"{self._url.rstrip('/')} at {endpoint or 'AWS'}")

    async def create(self, key: str, content: bytes | Path) -> None:
        """Write an object with a single conditional request, a large file in parts; see `ObjectStore.create`."""
        _checked(key)
        if isinstance(content, Path) and content.stat().st_size > _LARGE_BYTES:
            await self._refuse_existing(key)  # before gigabytes are sent for nothing
            await asyncio.to_thread(self._create_in_parts, key, content)
            return
        data = content if isinstance(content, bytes) else await asyncio.to_thread(content.read_bytes)
        with self._errors(key):
            await obstore.put_async(self._store, key, data, mode="create", use_multipart=False)

    async def _refuse_existing(self, key: str) -> None:
        try:
            await self.head(key)
        except NotFoundError:
            return
        raise ObjectExistsError("the object exists already", where=f"{self._where}/{key}")

    def _create_in_parts(self, key: str, path: Path) -> None:
        from botocore.exceptions import BotoCoreError, ClientError

        from ssmd_dagster.stores import parts

        where = f"{self._where}/{key}"
        try:
            parts.create_in_parts(parts.open_client(**self._client), self._bucket, f"{self._prefix}{key}", path)
        except ClientError as error:
            status = parts.status_of(error)
            if status == HTTPStatus.PRECONDITION_FAILED:
                raise ObjectExistsError("the object exists already", where=where) from error
            raise _refused(status, str(error), where) from error
        except BotoCoreError as error:
            raise _refused(0, str(error), where) from error

    def url(self, key: str) -> str:
        """Return `s3://bucket/prefix/key`."""
        return f"{self._url}{key}"


def open_object_stores(env: Environment, home: Path, secrets: Mapping[str, str]) -> tuple[ObjectStore, ObjectStore]:
    """Open the stores of raw files and of tables of an environment; an S3 service is not asked yet.

    Raises:
        ConfigurationError: A credential is missing, or the local folder cannot be made.
    """
    storage = env.storage
    buckets = (storage.buckets.raw, storage.buckets.normalized)
    if storage.type == "local":
        raw, normalized = (LocalObjectStore(storage.folder(home) / bucket) for bucket in buckets)
        return raw, normalized
    key_id = env.secret("s3", "access_key_id", secrets) if "s3" in env.keys else None
    key = env.secret("s3", "secret_access_key", secrets) if "s3" in env.keys else None
    first, second = (
        S3ObjectStore(
            bucket,
            region=storage.region,
            endpoint=storage.endpoint,
            prefix=storage.prefix,
            access_key_id=key_id,
            secret_access_key=key,
        )
        for bucket in buckets
    )
    return first, second


def _refused(status: int, what: str, where: str) -> SsmdError:
    """Return the error of an answer with this HTTP status, 0 where there was none."""
    if 400 <= status < 500 and status not in _PASSING_STATUSES:
        return ConfigurationError(what, where=where, do="Check storage in the environment's file")
    return UnreachableError(what, where=where, do="Check that the object store runs")


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise SsmdError(f"{key!r} is no key of an object", do="Encode names before they become keys")
    return key


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _CONFIGURATION_ERRNOS:
            raise ConfigurationError(
                f"cannot be written: {error.strerror}", where=str(path), do="Check the folder's owner and mode"
            ) from error
        raise StorageError(
            f"cannot be written: {error.strerror}", where=str(path), do="Check the disk and its free space"
        ) from error


def _write_durably(path: Path, content: bytes | Path) -> None:
    with path.open("xb") as target:
        if isinstance(content, bytes):
            target.write(content)
        else:
            with content.open("rb") as source:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
        target.flush()
        os.fsync(target.fileno())


def _make_folder(folder: Path) -> None:
    """Make a folder and its missing parents, each durable in its own."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
