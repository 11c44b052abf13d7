"""Kalshi's own schemas as validators, where a checkout has them beside it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]
from referencing import Registry
from referencing.jsonschema import DRAFT202012

FOLDER = Path(__file__).parents[3] / "shared" / "kalshi"
DATA = FOLDER / "data"

PAYLOAD_OF_TYPE = {
    "orderbook_snapshot": "orderbookSnapshotPayload",
    "orderbook_delta": "orderbookDeltaPayload",
    "ticker": "tickerPayload",
    "trade": "tradePayload",
    "market_lifecycle_v2": "marketLifecycleV2Payload",
    "multivariate_market_lifecycle": "multivariateMarketLifecyclePayload",
    "event_lifecycle": "eventLifecyclePayload",
    "event_fee_update": "eventFeeUpdatePayload",
    "subscribed": "subscribedResponsePayload",
    "unsubscribed": "unsubscribedResponsePayload",
    "ok": "okResponsePayload",
    "error": "errorResponsePayload",
    "cfbenchmarks_value": "cfbenchmarksValuePayload",
    "cfbenchmarks_value_5hz": "cfbenchmarksValue5HzPayload",
    "cfbenchmarks_value_indexlist": "cfbenchmarksIndexListPayload",
    "cfbenchmarks_value_5hz_indexlist": "cfbenchmarks5HzIndexListPayload",
    "pyth_value": "pythValuePayload",
    "pyth_value_underlying_list": "pythUnderlyingListPayload",
}


@cache
def _document(name: str) -> Any:
    path = FOLDER / name
    if not path.exists():
        pytest.skip(f"{name} is not beside this checkout")
    return _nullable(yaml.load(path.read_text(), yaml.CSafeLoader))


def _nullable(node: Any) -> Any:
    """Turn OpenAPI 3.0's `nullable` into JSON Schema, and forbid keys that a schema does not name."""
    if isinstance(node, list):
        return [_nullable(each) for each in node]
    if not isinstance(node, dict):
        return node
    out = {key: _nullable(value) for key, value in node.items()}
    if "settlement_bounds_type" in out.get("properties", {}):
        out["properties"]["liquidity_dollars"] = {"type": "string"}  # removed by 3.34.0, still sent: clients require it
    if isinstance(out.get("properties"), dict) and out.get("type") == "object":
        out.setdefault("additionalProperties", False)
    if out.pop("nullable", False) is True and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    return out


@cache
def _validator(document: str, schema: str) -> Draft202012Validator:
    resource = DRAFT202012.create_resource(_document(document))
    registry: Registry[Any] = Registry().with_resource("urn:kalshi", resource)
    return Draft202012Validator({"$ref": f"urn:kalshi#/components/schemas/{schema}"}, registry=registry)


def check_frame(frame: dict[str, Any]) -> None:
    """Assert that a WebSocket message is as the AsyncAPI file has it, with no key that it does not name."""
    schema = PAYLOAD_OF_TYPE[frame["type"]]
    if frame["type"] == "ok" and isinstance(frame.get("msg"), list):
        schema = "listSubscriptionsResponsePayload"
    if frame["type"] == "ok" and "index_ids" in (frame.get("msg") or {}):
        schema = "subscribedIndicesResponsePayload"
    if frame["type"] == "ok" and "underlying_tickers" in (frame.get("msg") or {}):
        schema = "subscribedUnderlyingsResponsePayload"
    if frame["type"] == "market_lifecycle_v2" and frame["msg"]["event_type"] == "metadata_updated":
        schema = "marketMetadataUpdatedPayload"
    _validator("asyncapi-2026-10-26.yaml", schema).validate(frame)


def check_answer(schema: str, answer: Any) -> None:
    """Assert that a REST answer is as the OpenAPI file has it."""
    _validator("openapi-3.34.0.yaml", schema).validate(answer)
