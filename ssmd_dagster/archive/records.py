"""One thing received, as one JSON line: the frame's own text with its receive time and ordinal, nothing interpreted.

A line is `{"n":17,"recv_ns":…,"wire":{…},"pad":["","\\n"]}`. `wire` is the frame byte for byte where it is JSON
without line breaks; what is not becomes `wire_text` (a JSON string) or, if it is not UTF-8 or escapes would swell it
beyond what a batch may hold, `wire_b64`. What the recorder itself says stands in `note`. `payload_of` gives back exactly the
bytes that came off the socket.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from ssmd_dagster.exchange import Envelope

_WHITE_SPACE = b" \t\n\r"
_LINE_BREAK, _RETURN, _BACKSLASH, _BRACE, _CLOSING_BRACE = b"\n\r\\{}"
_MAX_PAD_BYTES = 4096
_MAX_TEXT_BYTES = 80 << 20
"""Control characters take six bytes when they are escaped; base64 takes four for three, whatever they are."""
_encode = msgspec.json.encode


class Record(msgspec.Struct, frozen=True):
    """One decoded line. Exactly one of `wire` (else empty), `wire_text`, `wire_b64` and `note` (else None) is set."""

    n: int
    recv_ns: int
    wire: msgspec.Raw = msgspec.Raw(b"")
    wire_text: str | None = None
    wire_b64: str | None = None
    pad: tuple[str, str] = ("", "")
    note: dict[str, Any] | None = None


_decode_record = msgspec.json.Decoder(Record).decode


class _Numbered(msgspec.Struct, gc=False):
    wire: Envelope | None = None
    wire_text: msgspec.Raw = msgspec.Raw(b"")
    wire_b64: msgspec.Raw = msgspec.Raw(b"")


_decode_numbered = msgspec.json.Decoder(_Numbered).decode
_decode_envelope = msgspec.json.Decoder(Envelope).decode


def is_plain_json(body: bytes) -> bool:
    """Tell whether `body` is one JSON value that every reader of JSON lines takes as it is."""
    if b"\n" in body or b"\r" in body:
        return False
    try:
        if not body.isascii():
            body.decode("utf-8")
        msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def wire_line(n: int, recv_ns: int, payload: bytes, *, checked: bool = False) -> bytes:
    """Return the line of one frame. `checked` says that the caller has seen `payload` to be one valid JSON object already.

    Frames with bytes beyond ASCII or with escapes are looked at again in any case: a shallow parse does not see
    broken UTF-8 or half a surrogate pair inside a string.
    """
    # Bytes are asked for single characters by number, which is several times as fast as by a string of one.
    if checked and payload.isascii() and _BACKSLASH not in payload and _RETURN not in payload and payload[0] == _BRACE:
        # What nearly every frame is: one object on one line, with or without a line break behind it.
        if _LINE_BREAK not in payload:
            if payload[-1] == _CLOSING_BRACE:
                return b'{"n":%d,"recv_ns":%d,"wire":%b}\n' % (n, recv_ns, payload)
        elif payload.endswith(b"}\n") and payload.find(b"\n") == len(payload) - 1:
            return b'{"n":%d,"recv_ns":%d,"wire":%b,"pad":["","\\n"]}\n' % (n, recv_ns, payload[:-1])
    body = payload.strip(_WHITE_SPACE)
    if len(payload) - len(body) <= _MAX_PAD_BYTES and is_plain_json(body):
        if len(body) == len(payload):
            return b'{"n":%d,"recv_ns":%d,"wire":%b}\n' % (n, recv_ns, body)
        start = payload.index(body)
        pad = _encode((payload[:start].decode(), payload[start + len(body) :].decode()))
        return b'{"n":%d,"recv_ns":%d,"wire":%b,"pad":%b}\n' % (n, recv_ns, body, pad)
    try:
        text = _encode(payload.decode("utf-8"))
    except UnicodeDecodeError:
        text = None
    if text is not None and len(text) <= _MAX_TEXT_BYTES:
        return b'{"n":%d,"recv_ns":%d,"wire_text":%b}\n' % (n, recv_ns, text)
    return b'{"n":%d,"recv_ns":%d,"wire_b64":"%b"}\n' % (n, recv_ns, base64.b64encode(payload))


def note_line(n: int, recv_ns: int, note: dict[str, Any]) -> bytes:
    """Return the line of something the recorder itself says; `note` has the key `event`."""
    return b'{"n":%d,"recv_ns":%d,"note":%b}\n' % (n, recv_ns, _encode(note))


def parse_record(line: bytes | memoryview) -> Record:
    """Decode one line (with or without its line break); raise `msgspec.DecodeError` where it is no record."""
    return _decode_record(line)


def payload_of(record: Record) -> bytes | None:
    """Return the frame as it came off the socket, byte for byte; None for a note."""
    if bytes(record.wire):
        return record.pad[0].encode() + bytes(record.wire) + record.pad[1].encode()
    if record.wire_text is not None:
        return record.wire_text.encode("utf-8")
    if record.wire_b64 is not None:
        return base64.b64decode(record.wire_b64)
    return None


def sequences_in(records: bytes) -> dict[int, list[int]]:
    """Return per sid the exchange's sequence numbers in a block of whole lines, in order, as the recorder counted them."""
    found: dict[int, list[int]] = {}
    for line in records.splitlines():
        envelope = _envelope_in(line)
        if envelope is not None and envelope.sid is not None and envelope.seq is not None:
            found.setdefault(envelope.sid, []).append(envelope.seq)
    return found


def _envelope_in(line: bytes) -> Envelope | None:
    try:
        numbered = _decode_numbered(line)
        if numbered.wire is not None or not (bytes(numbered.wire_text) or bytes(numbered.wire_b64)):
            return numbered.wire
        payload = payload_of(_decode_record(line)) or b""
        payload.decode()
        return _decode_envelope(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):  # a frame of another shape has no number
        return None
