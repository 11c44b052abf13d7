"""A record gives back exactly the bytes that came in, whatever came in."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from ssmd_dagster.archive import records
from ssmd_dagster.archive.records import note_line, parse_record, payload_of, wire_line

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(st.binary(), st.booleans())
@example(b'{"msg":"\xff"}', True)
@example(b'{"msg":"\\ud800"}', True)
@example(b"[" * 100_000 + b"]" * 100_000, False)
@example(b' {"a":1}\r\n', False)
@example(b'{"a":\n1}', True)
@example(b'{"a":1}\n', True)
@example(b'{"a":1}\r\n', True)
@example(b'{"a":1}\n\n', True)
@example(b' {"a":1}', True)
@example(b'{"a":1} \n', True)
@example(b"", False)
def test_every_payload_comes_back_byte_for_byte(payload: bytes, checked: bool) -> None:
    """Any bytes at all become one line of valid JSON that gives them back."""
    line = wire_line(17, 1765670400123456789, payload, checked=checked and _is_json(payload))
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    record = parse_record(line)
    assert (record.n, record.recv_ns) == (17, 1765670400123456789)
    assert payload_of(record) == payload
    if len(payload) < 50_000:
        json.loads(line)


@given(JSON_VALUES, st.sampled_from(["", "\n", " \t", "\r\n"]), st.booleans())
def test_json_is_kept_as_it_came(value: object, end: str, ascii_only: bool) -> None:
    """Valid JSON on one line stands in `wire` as the same text, with the white space at its end kept apart."""
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    record = parse_record(wire_line(0, 1, body + end.encode()))
    if not bytes(record.wire):  # half a surrogate pair is no text that every reader takes
        assert record.wire_text is not None or record.wire_b64 is not None
    else:
        assert bytes(record.wire) == body
        assert record.pad == ("", end)


def test_a_note_is_a_record_without_a_payload() -> None:
    """What the recorder itself says stands in `note` and is no frame."""
    record = parse_record(note_line(3, 5, {"event": "connected"}))
    assert record.note == {"event": "connected"}
    assert payload_of(record) is None


@pytest.mark.parametrize("payload", [b'{"a":1}', b'{"a":1}\n'])
def test_the_line_has_the_keys_in_the_documented_order(payload: bytes) -> None:
    """Keys stand in the order n, recv_ns, wire, pad."""
    keys = list(json.loads(wire_line(1, 2, payload)))
    assert keys == ["n", "recv_ns", "wire", "pad"][: len(keys)]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_frame_that_was_checked_gives_the_same_line_as_one_that_was_not(end: bytes) -> None:
    """The quick way for the usual frame and the careful one write the same bytes."""
    payload = b'{"type":"trade","sid":1,"msg":{"price":"0.55"}}' + end
    assert wire_line(1, 2, payload, checked=True) == wire_line(1, 2, payload)


def test_escapes_cannot_swell_a_record_beyond_what_a_batch_may_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text of which every byte would take six becomes base64, and so does JSON with a sea of white space around it."""
    monkeypatch.setattr(records, "_MAX_TEXT_BYTES", 10_000)
    for payload in (b"\x01" * 5_000, b"\n" * 6_000 + b"{}"):
        record = parse_record(wire_line(0, 1, payload))
        assert record.wire_b64 is not None
        assert payload_of(record) == payload
    assert parse_record(wire_line(0, 1, b"\x01" * 1_000)).wire_text is not None
    assert parse_record(wire_line(0, 1, b" " * 5_000 + b"{}")).wire_text is not None


def _is_json(payload: bytes) -> bool:
    try:
        json.loads(payload)
    except (ValueError, RecursionError):
        return False
    return True
