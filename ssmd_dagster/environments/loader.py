"""Reading `exchanges/`: every file into its model, every fault by file, key, value and what was expected.

A broken file never raises: it is a fault, and the environments that do not need it stay usable. The rules of a single
file are in `models`; here are YAML itself, what files must agree on, and how faults read. Values that may be
credentials are hidden.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ssmd_dagster.environments.home import exchanges_dir, project_dir
from ssmd_dagster.environments.models import (
    EXCHANGE_KEY_FIELDS,
    KEY_FIELDS,
    Environment,
    Feed,
    LocalStorage,
    Model,
    Schema,
)
from ssmd_dagster.errors import ConfigurationError, NotFoundError
from ssmd_dagster.exchange import adapter_names

MAX_FILE_BYTES = 65_536

_HOME = Path("/home")
"""Stands for any SSMD_HOME where folders are compared."""
_KINDS = ("feeds", "schemas", "environments")
_STEM = re.compile(r"[a-z][a-z0-9-]{0,62}\Z")
_SECRET_KEY = re.compile(r"pass|secret|token|credential|private|key", re.IGNORECASE)
_USERINFO = re.compile(r"://[^/@\s]*@")


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one key of one file; `value` is as printed, with credentials hidden."""

    file: str
    key: str
    value: str
    expected: str

    def __str__(self) -> str:
        place = f"{self.file}: {self.key}" if self.key else self.file
        return f"{place}: got {self.value}, expected {self.expected}"


@dataclass(frozen=True)
class Registry:
    """All that a folder configures. `environments` holds the usable ones only; `faults` every fault, once."""

    directory: Path
    environments: Mapping[str, Environment]
    feeds: Mapping[str, Feed]
    schemas: Mapping[str, Schema]
    faults: Sequence[Fault]
    broken: Mapping[str, Sequence[Fault]] = field(default_factory=dict)
    """Environments that cannot be used, by file name, each with all the faults that it suffers from."""

    def names(self) -> list[str]:
        """Return the names of all environments, broken ones too."""
        return sorted({*self.environments, *self.broken})

    def get(self, name: str) -> Environment:
        """Return a usable environment.

        Raises:
            NotFoundError: There is none of that name; lists the known ones.
            ConfigurationError: Its files, or those it refers to, are broken; one line per fault.
        """
        if name in self.environments:
            return self.environments[name]
        if name in self.broken:
            raise broken_configuration(self.broken[name], where=name)
        known = ", ".join(self.names()) or "none"
        raise NotFoundError(f"there is no environment {name!r}", where=str(self.directory), do=f"Known: {known}")


def broken_configuration(faults: Sequence[Fault], *, where: str) -> ConfigurationError:
    """Make the error that lists faults, one a line."""
    count = f"{len(faults)} fault{'' if len(faults) == 1 else 's'} in the configuration"
    return ConfigurationError("\n  ".join([f"{count} of {where}:", *map(str, faults)]))


def load_registry(directory: Path | None = None) -> Registry:
    """Read a folder with `feeds/`, `schemas/` and `environments/`, by default `home.exchanges_dir()`; never raises."""
    root = exchanges_dir() if directory is None else directory.absolute()
    return _Loading(root).registry()


_M = TypeVar("_M", bound=Model)


class _Loading:
    """One pass over a folder. Faults are kept by (kind, file name), so that each environment knows its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict[tuple[str, str], list[Fault]] = {}

    def registry(self) -> Registry:
        feeds = self.load("feeds", Feed)
        schemas = self.load("schemas", Schema)
        for stem, schema in schemas.items():
            self.check_schema(stem, schema)
        environments = self.load("environments", Environment)
        for stem, environment in environments.items():
            self.check_environment(stem, environment, feeds, schemas)
        self.check_storage(environments)
        self.check_simulators(environments)

        usable: dict[str, Environment] = {}
        broken: dict[str, list[Fault]] = {}
        for stem in sorted({*environments, *(stem for kind, stem in self.faults if kind == "environments" and stem)}):
            faults = list(self.faults.get(("environments", stem), ()))
            if stem in environments:
                environment = environments[stem]
                faults += self.faults.get(("feeds", environment.feed), ())
                faults += self.faults.get(("schemas", environment.schema_ref.partition(":")[0]), ())
                if not faults:
                    environment.bind(feeds[environment.feed])
                    usable[stem] = environment
            if faults:
                broken[stem] = faults
        return Registry(
            directory=self.root,
            environments=usable,
            feeds={stem: feed for stem, feed in feeds.items() if ("feeds", stem) not in self.faults},
            schemas={stem: schema for stem, schema in schemas.items() if ("schemas", stem) not in self.faults},
            faults=[fault for faults in self.faults.values() for fault in faults],
            broken=broken,
        )

    def fault(self, kind: str, stem: str, key: str, value: object, expected: str, *, path: Path | None = None) -> None:
        file = self.root / kind / f"{stem}.yaml" if path is None else path
        shown = str(file.relative_to(project_dir())) if file.is_relative_to(project_dir()) else str(file)
        self.faults.setdefault((kind, stem), []).append(Fault(shown, key, _shown(key, value), expected))

    def load(self, kind: str, model: type[_M]) -> dict[str, _M]:
        """Read all files of a kind into their models, by file name without ending."""
        folder = self.root / kind
        try:
            paths = sorted(path for path in folder.iterdir() if not path.name.startswith((".", "#")))
        except OSError as error:
            self.fault(kind, "", "", _Plain(error.strerror or "no folder"), "a readable folder", path=folder)
            return {}
        loaded: dict[str, _M] = {}
        for path in paths:
            if path.suffix == ".yml":
                self.fault(kind, path.stem, "", _Plain("the ending .yml"), "the ending .yaml", path=path)
            if path.suffix != ".yaml":
                continue
            found = self.load_file(kind, path, model)
            if found is not None:
                loaded[path.stem] = found
        return loaded

    def load_file(self, kind: str, path: Path, model: type[_M]) -> _M | None:
        stem = path.stem
        if not _STEM.match(stem):
            self.fault(
                kind, stem, "", _Plain(f"the file name {path.name!r}"), "a-z, 0-9 and -, beginning with a letter"
            )
            return None
        content = self.read(kind, path)
        if content is None:
            return None
        try:
            found = model.model_validate(content)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                self.fault(kind, stem, *_explained(model, content, detail))
            return None
        name = getattr(found, "name")  # noqa: B009 - every model of a file has one, the base has not
        if name != stem:
            self.fault(kind, stem, "name", name, f"the file's name, {stem}")
        return found

    def read(self, kind: str, path: Path) -> dict[str, Any] | None:
        """Read one YAML file into plain values; None after its faults were noted."""
        stem = path.stem
        try:
            if path.stat().st_size > MAX_FILE_BYTES:
                self.fault(kind, stem, "", _Plain("a larger file"), f"at most {MAX_FILE_BYTES} bytes")
                return None
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            self.fault(kind, stem, "", _Plain(error.strerror or "an unreadable file"), "a readable file")
            return None
        except UnicodeDecodeError:
            self.fault(kind, stem, "", _Plain("bytes that are not UTF-8"), "YAML in UTF-8")
            return None
        try:
            loader = _PlainLoader(text)
            node = loader.get_single_node()
            content = None if node is None else loader.construct_document(node)
        except yaml.MarkedYAMLError as error:
            line = 0 if error.problem_mark is None else error.problem_mark.line + 1
            self.fault(kind, stem, f"line {line}", _Plain(error.problem or "broken YAML"), "YAML")
            return None
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as characters YAML forbids, or 2025-13-01
            problem = "too deep a nesting" if isinstance(error, RecursionError) else str(error).splitlines()[0]
            self.fault(kind, stem, "", _Plain(problem), "YAML")
            return None
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
            self.fault(kind, stem, "", _Plain("no mapping"), "keys with their values")
            return None
        for key, line in _repeated(node, ""):
            self.fault(kind, stem, key, _Plain(f"it again in line {line}"), "each key once")
        return content

    def check_schema(self, stem: str, schema: Schema) -> None:
        """The file of each version must be there and be the one that was meant."""
        for index, version in enumerate(schema.versions):
            key = f"versions.{index}"
            try:
                digest = hashlib.sha256((self.root / "schemas" / version.file).read_bytes()).hexdigest()
            except OSError as error:
                self.fault("schemas", stem, f"{key}.file", version.file, f"a readable file ({error.strerror})")
                continue
            if digest != version.sha256:
                self.fault("schemas", stem, f"{key}.sha256", version.sha256, f"{digest}, that of {version.file}")

    def check_environment(
        self, stem: str, environment: Environment, feeds: Mapping[str, Feed], schemas: Mapping[str, Schema]
    ) -> None:
        """What an environment says of feeds, schemas, credentials and addresses must fit them."""
        for key, address in (("endpoint", environment.endpoint), ("rest_endpoint", environment.rest_endpoint)):
            if environment.simulator is not None and address is not None:
                self.fault(
                    "environments", stem, key, address, "no address beside simulator; the running stack gives it"
                )
        self.check_schema_ref(stem, environment, schemas)
        if environment.feed in feeds:
            self.check_feed(stem, environment, feeds[environment.feed])
            self.check_keys(stem, environment)
        elif ("feeds", environment.feed) not in self.faults:
            self.fault("environments", stem, "feed", environment.feed, _one_of(feeds))

    def check_schema_ref(self, stem: str, environment: Environment, schemas: Mapping[str, Schema]) -> None:
        """The schema must be there, in an active version."""
        name, _, version = environment.schema_ref.partition(":")
        if name in schemas:
            active = [entry.version for entry in schemas[name].versions if entry.status == "active"]
            if version not in active:
                expected = _one_of(f"{name}:{entry}" for entry in active)
                self.fault("environments", stem, "schema", environment.schema_ref, expected)
        elif ("schemas", name) not in self.faults:
            expected = _one_of(f"{known}:…" for known in schemas)
            self.fault("environments", stem, "schema", environment.schema_ref, expected)

    def check_keys(self, stem: str, environment: Environment) -> None:
        """Credentials must be those of the feed and of the servers, and complete."""

        def fault(key: str, value: object, expected: str) -> None:
            self.fault("environments", stem, key, value, expected)

        fields_of = {environment.feed: EXCHANGE_KEY_FIELDS, **KEY_FIELDS}
        for name, keys in environment.keys.items():
            if name not in fields_of:
                fault(f"keys.{name}", _Plain("it"), _one_of(fields_of))
            elif set(keys.fields) != fields_of[name]:
                fields = ", ".join(sorted(keys.fields)) or "none"
                fault(f"keys.{name}.fields", _Plain(fields), f"the fields {', '.join(sorted(fields_of[name]))}")

        if environment.alerts.slack is not None and "slack" not in environment.keys:
            fault("keys.slack", _Plain("nothing"), "the field token, since alerts.slack is set")

    def check_feed(self, stem: str, environment: Environment, feed: Feed) -> None:
        """The feed must be active, in force from the first day on, and carry the channels."""

        def fault(key: str, value: object, expected: str) -> None:
            self.fault("environments", stem, key, value, expected)

        if environment.feed not in adapter_names():
            fault("feed", environment.feed, f"a feed that this installation can record: {_one_of(adapter_names())}")
        if feed.status != "active":
            fault("feed", environment.feed, f"an active feed; it is {feed.status}")
        version = feed.version_of(environment.first_day)
        if version is None:
            earliest = min(entry.effective_from for entry in feed.versions)
            fault("first_day", environment.first_day, f"a day from {earliest} on, when {feed.name} has a version")
            return
        supported = {"orderbook_delta": version.supports_orderbook, "trade": version.supports_trades}
        for index, channel in enumerate(environment.capture.channels):
            if not supported.get(channel, True):
                fault(f"capture.channels.{index}", channel, f"a channel that {feed.name} {version.version} supports")
        method = environment.auth_method or version.auth_method
        if method == "api_key" and environment.feed not in environment.keys:
            fields = ", ".join(sorted(EXCHANGE_KEY_FIELDS))
            fault(f"keys.{environment.feed}", _Plain("nothing"), f"fields {fields}, since auth_method is api_key")

    def check_storage(self, environments: Mapping[str, Environment]) -> None:
        """No two environments may write the same keys."""
        owner: dict[tuple[str, ...], str] = {}
        for stem, environment in sorted(environments.items()):
            storage = environment.storage
            # However a folder is written: by default, relative, or with dots in it.
            place = os.path.normpath(storage.folder(_HOME)) if isinstance(storage, LocalStorage) else storage.prefix
            for which, bucket in (("raw", storage.buckets.raw), ("normalized", storage.buckets.normalized)):
                first = owner.setdefault((storage.type, place, bucket, environment.feed), stem)
                if first != stem:
                    key = f"storage.buckets.{which}"
                    self.fault("environments", stem, key, bucket, f"another bucket or folder than that of {first}")

    def check_simulators(self, environments: Mapping[str, Environment]) -> None:
        """Every simulated exchange makes a key of its own, which must not take the place of another's."""
        owner: dict[str, str] = {}
        for stem, environment in sorted(environments.items()):
            keys = environment.keys.get(environment.feed) if environment.simulator is not None else None
            for field_name, variable in () if keys is None else sorted(keys.fields.items()):
                first = owner.setdefault(variable, stem)
                if first != stem:
                    key = f"keys.{environment.feed}.fields.{field_name}"
                    expected = "one of its own: every simulated exchange makes its own key"
                    self.fault("environments", stem, key, _Plain(f"the variable of {first}"), expected)


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without aliases and tags: nothing here needs them, and they can make a small file endless."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent) or getattr(self.current_event, "tag", None) is not None:
            raise yaml.composer.ComposerError(None, None, "an alias or a tag", self.current_event.start_mark)
        return super().compose_node(parent, index)

    def construct_yaml_timestamp(self, node: yaml.ScalarNode) -> Any:
        """Leave a date that does not exist as text, so that the fault names its key."""
        try:
            return super().construct_yaml_timestamp(node)
        except ValueError:
            return node.value


_PlainLoader.add_constructor("tag:yaml.org,2002:timestamp", _PlainLoader.construct_yaml_timestamp)


class _Plain(str):
    """A value that is printed as it stands, since it is our description and not the file's text."""

    __slots__ = ()


def _repeated(node: yaml.Node | None, path: str) -> Iterator[tuple[str, int]]:
    """Yield dotted key and line of every key that stands twice in its mapping; YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key_node, value_node in node.value:
            key = f"{path}.{key_node.value}" if path else str(key_node.value)
            if str(key_node.value) in seen:
                yield key, key_node.start_mark.line + 1
            seen.add(str(key_node.value))
            yield from _repeated(value_node, key)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _repeated(item, f"{path}.{index}")


_TAGGED = frozenset({"transport", "cache", "storage"})
_EXPECTED = {
    "missing": "a value",
    "string_type": "text (in quotes where YAML would read something else)",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "date_type": "a date YYYY-MM-DD",
    "tuple_type": "a list",
    "dict_type": "keys with their values",
    "model_type": "keys with their values",
    "model_attributes_type": "keys with their values",
    "greater_than": "more than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than_equal": "at most {le:g}",
    "string_too_short": "at least {min_length} character",
    "finite_number": "a finite number",
}


def _explained(model: type[Model], content: object, detail: ErrorDetails) -> tuple[str, object, str]:
    """Turn one of pydantic's errors into key, value and what was expected."""
    location = detail["loc"]
    # pydantic puts the tag of a union behind its key, and "[key]" behind a mapping's bad key
    path = [
        part
        for index, part in enumerate(location)
        if part != "[key]" and not (index == 1 and location[0] in _TAGGED and len(location) > 1)
    ]
    key = ".".join(map(str, path))
    value: object = _at(content, path)
    kind = detail["type"]
    context = detail.get("ctx", {})
    if kind == "missing":
        value = _Plain("nothing")
    if kind == "extra_forbidden":
        known = _fields_at(model, location[:-1])
        close = difflib.get_close_matches(str(path[-1]), known, n=1)
        return key, value, f"no such key; {f'did you mean {close[0]}?' if close else _one_of(known)}"
    if kind == "expected":
        expected = str(context["expected"])
    elif kind == "literal_error":
        expected = str(context["expected"]).replace("'", "")
    elif kind in ("union_tag_invalid", "union_tag_not_found"):
        key, value = f"{key}.type", context.get("tag", _Plain("nothing"))
        expected = _one_of(_tags_at(model, location))
    elif kind in _EXPECTED:
        expected = _EXPECTED[kind].format(**context)
    else:
        expected = f"something else: {detail['msg']}"
    return key, value, expected


def _at(content: object, path: Sequence[int | str]) -> object:
    for part in path:
        if isinstance(content, dict) and part in content:
            content = content[part]
            continue
        if not isinstance(content, list) or not isinstance(part, int) or part >= len(content):
            break
        content = content[part]
    return content


def _fields_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the keys that the model knows at a location."""
    return sorted({known.alias or name for found in _models_at(model, location) for name, known in found.items()})


def _tags_at(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the values of `type` that are known at a location."""
    return [tag for found in _models_at(model, location) for tag in get_args(found["type"].annotation)]


def _models_at(model: type[BaseModel], location: Sequence[int | str]) -> list[dict[str, FieldInfo]]:
    """Return the fields of the models that may stand at a location of pydantic's, which holds the tags of unions."""
    candidates = [model]
    for part in location:
        if isinstance(part, int):
            continue
        fields = [known.model_fields[part] for known in candidates if part in known.model_fields]
        if fields:
            candidates = [found for known in fields for found in _models_in(known.annotation)]
        elif any("type" in known.model_fields for known in candidates):
            candidates = [known for known in candidates if part in get_args(known.model_fields["type"].annotation)]
    return [known.model_fields for known in candidates]


def _models_in(annotation: object) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in get_args(annotation) for found in _models_in(argument)]


def _one_of(names: Any) -> str:
    known = sorted(names)
    return f"one of {', '.join(known)}" if known else "one that exists (there is none)"


def _shown(key: str, value: object) -> str:
    """Return a value for a fault's text: short, and hidden where it may be a credential."""
    if isinstance(value, _Plain):
        return str(value)
    parts = key.split(".")
    text = repr(value)
    if parts[0] == "keys" or _SECRET_KEY.search(parts[-1]) or "-----BEGIN" in text:
        return "a hidden value"
    if isinstance(value, dict):
        return f"a mapping with the keys {', '.join(map(str, value))}"[:80] if value else "an empty mapping"
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return "a list of lists or mappings"
    if isinstance(value, date):
        return value.isoformat()
    text = _USERINFO.sub("://…@", text)
    return text if len(text) <= 80 else f"{text[:79]}…"
