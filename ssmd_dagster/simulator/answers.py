"""How the simulated exchange's REST reads parameters and writes answers and errors."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Any

from aiohttp import web

from ssmd_dagster.simulator.faults import Faults
from ssmd_dagster.simulator.frames import compact

PREFIX = "/trade-api/v2"


class WrongRequestError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.code = code
        self.message = message
        super().__init__(message)


def error_response(status: int, code: str, message: str, details: str = "") -> web.Response:
    """Return an error as Kalshi's REST writes it."""
    error = {"code": code, "message": message, **({"details": details} if details else {}), "service": "api"}
    return web.Response(status=status, body=compact({"error": error}), content_type="application/json")


def json_answer(body: bytes) -> web.Response:
    """Return an answer whose body is JSON already."""
    return web.Response(body=body, content_type="application/json")


def cursor_of(value: Any) -> str:
    """Return a cursor that stands for a place in a list."""
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


def integer(request: web.Request, name: str) -> int | None:
    """Return a parameter that is a whole number, None where it is not given."""
    text = request.query.get(name)
    if not text:
        return None
    try:
        return int(text)
    except ValueError:
        raise WrongRequestError(400, "bad_request", f"{name} is not an integer") from None


def page_limit(request: web.Request, default: int, most: int) -> int:
    """Return how many rows a page shall have."""
    limit = integer(request, "limit")
    if limit is None or limit == 0:
        return default
    if not 0 < limit <= most:
        raise WrongRequestError(400, "bad_request", f"limit must be between 1 and {most}")
    return limit


def position(request: web.Request) -> Any:
    """Return the place that a request's cursor stands for, None without one."""
    text = request.query.get("cursor")
    if not text:
        return None
    try:
        return json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (binascii.Error, ValueError):
        raise WrongRequestError(400, "invalid_cursor", "invalid cursor") from None


def shortened(faults: Faults, request: web.Request, rows: list[bytes]) -> list[bytes]:
    """Return a page's rows, without its last ones where a fault says so."""
    path = request.path.removeprefix(PREFIX)
    if rows and (fault := faults.over_http(("http_short",), path)):
        return rows[: max(0, len(rows) - (fault.order.size or 1))]
    return rows
