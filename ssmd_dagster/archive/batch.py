"""One batch: records of one channel of one connection as a checksummed zstd frame plus a small trailer.

The same bytes lie in the spool, travel through the stream and stand in segments. The trailer is a zstd skippable
frame, so `zstd -dc`, DuckDB, Polars and pandas read a file of batches as plain compressed JSON lines:

    zstd(records, level 3, checksum, content size)
    u32 0x184D2A50 · u32 size · header JSON · u32 length of the data · u32 length of the header · u32 crc32

(little endian; the crc32 covers header and lengths). Because the lengths stand last, headers are listed from the
back without decompressing, and a reader that meets damage finds the next batch by magic and crc. No I/O here.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterator, Sequence

import msgspec
import zstandard

from ssmd_dagster.errors import SsmdError

MAX_RECORDS_BYTES = 96 << 20
"""Most bytes of records in one batch: a 64 MiB frame as base64 stays below it. Readers refuse more."""
MAX_HEADER_BYTES = 1 << 20
ZSTD_LEVEL = 3

_SKIPPABLE_MAGIC = 0x184D2A50
_MAGIC_BYTES = struct.pack("<I", _SKIPPABLE_MAGIC)
_PREFIX = struct.Struct("<II")
_LENGTHS = struct.Struct("<II")
_CRC = struct.Struct("<I")
_SUFFIX_BYTES = _LENGTHS.size + _CRC.size
_SEARCH_BYTES = 4 << 20


class BatchHeader(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a batch holds, without decompressing it. `seq` is per sid `[lowest, highest, how many distinct]`.

    `joined` is set where the archiver joined neighbours: the first and the last batch number that went in.
    """

    v: int
    env: str
    day: str
    epoch: int
    conn: str
    channel: str
    batch: int
    records: int
    n_first: int
    n_last: int
    recv_first_ns: int
    recv_last_ns: int
    bytes: int
    sha256: str
    seq: dict[str, tuple[int, int, int]]
    joined: tuple[int, int] | None = None

    @property
    def span(self) -> tuple[int, int]:
        """Return the first and the last original batch number inside."""
        return self.joined or (self.batch, self.batch)


class SegmentFooter(msgspec.Struct, frozen=True, kw_only=True):
    """The last trailer of a segment, over no data of its own.

    `prev_sha256` is the hash of the channel's previous segment (None for the first); `ranges` says per connection
    which batches lie inside, as inclusive ranges.
    """

    v: int
    footer: bool
    env: str
    day: str
    channel: str
    segment: int
    epoch: int
    prev_sha256: str | None
    batches: int
    records: int
    ranges: dict[str, tuple[tuple[int, int], ...]]


class Batch(msgspec.Struct, frozen=True):
    """One batch found in a run of bytes: the compressed frame is `buffer[start:data_end]`, the whole `[start:end]`."""

    header: BatchHeader
    start: int
    data_end: int
    end: int


class Footer(msgspec.Struct, frozen=True):
    """A segment's footer found in a run of bytes."""

    footer: SegmentFooter
    start: int
    end: int


class Damage(msgspec.Struct, frozen=True):
    """Bytes `[start:end]` that belong to no whole batch: a torn tail or a spoilt batch."""

    start: int
    end: int


class BatchDamagedError(SsmdError):
    """A batch whose bytes are not what its header says."""


class _Kind(msgspec.Struct):
    footer: bool = False


_decode_kind = msgspec.json.Decoder(_Kind).decode
_decode_header = msgspec.json.Decoder(BatchHeader).decode
_decode_footer = msgspec.json.Decoder(SegmentFooter).decode


def encode_batch(header: BatchHeader, records: bytes) -> bytes:
    """Compress `records` and append the trailer. Level 3, with checksum and content size; safe in any thread."""
    data = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True, write_content_size=True).compress(records)
    return data + _trailer(msgspec.json.encode(header), len(data))


def encode_footer(footer: SegmentFooter) -> bytes:
    """Return the bytes that end a segment."""
    return _trailer(msgspec.json.encode(footer), 0)


def _trailer(header_json: bytes, data_bytes: int) -> bytes:
    lengths = _LENGTHS.pack(data_bytes, len(header_json))
    crc = _CRC.pack(zlib.crc32(lengths, zlib.crc32(header_json)))
    size = len(header_json) + _SUFFIX_BYTES
    return _PREFIX.pack(_SKIPPABLE_MAGIC, size) + header_json + lengths + crc


def seq_spans(seqs: dict[int, list[int]]) -> dict[str, tuple[int, int, int]]:
    """Return per sid the lowest and highest sequence number and how many distinct ones there are."""
    return {str(sid): (min(values), max(values), len(set(values))) for sid, values in seqs.items()}


def join_headers(headers: Sequence[BatchHeader], sha256: str) -> BatchHeader:
    """Return the header of neighbouring batches of one (connection, channel) put together, `sha256` of all records."""
    first, last = headers[0], headers[-1]
    if len(headers) == 1:
        return first
    seq: dict[str, tuple[int, int, int]] = {}
    for header in headers:
        for sid, (low, high, distinct) in header.seq.items():
            before = seq.get(sid)
            seq[sid] = (
                (low, high, distinct)
                if before is None
                else (min(before[0], low), max(before[1], high), before[2] + distinct)
            )
    return msgspec.structs.replace(
        first,
        records=sum(header.records for header in headers),
        n_last=last.n_last,
        recv_last_ns=last.recv_last_ns,
        bytes=sum(header.bytes for header in headers),
        sha256=sha256,
        seq=seq,
        joined=(first.span[0], last.span[1]),
    )


def seqs_join_up(headers: Sequence[BatchHeader]) -> bool:
    """Tell whether each sid's numbers go on from batch to batch without a hole or a repetition.

    Only then is the number of distinct ones in all the sum of those in each.
    """
    reached: dict[str, int] = {}
    for header in headers:
        for sid, (low, high, distinct) in header.seq.items():
            if high - low + 1 != distinct or reached.get(sid, low - 1) != low - 1:
                return False
            reached[sid] = high
    return True


def read_last(buffer: bytes | memoryview, end: int | None = None) -> Batch | Footer | None:
    """Return what ends at `end` (default: the buffer's end), or None where no whole trailer and its data end there."""
    end = len(buffer) if end is None else end
    if end < _PREFIX.size + _SUFFIX_BYTES:
        return None
    data_bytes, header_bytes = _LENGTHS.unpack_from(buffer, end - _SUFFIX_BYTES)
    start = end - _SUFFIX_BYTES - header_bytes - _PREFIX.size
    if header_bytes > MAX_HEADER_BYTES or start - data_bytes < 0:
        return None
    return _read_trailer(buffer, start, end)


def _read_trailer(buffer: bytes | memoryview, start: int, end_limit: int) -> Batch | Footer | None:
    """Return the trailer that begins at `start`, with its data before it, if it is whole and its crc agrees."""
    if start < 0 or start + _PREFIX.size > end_limit:
        return None
    magic, size = _PREFIX.unpack_from(buffer, start)
    end = start + _PREFIX.size + size
    if magic != _SKIPPABLE_MAGIC or end > end_limit or not _SUFFIX_BYTES <= size <= MAX_HEADER_BYTES + _SUFFIX_BYTES:
        return None
    data_bytes, header_bytes = _LENGTHS.unpack_from(buffer, end - _SUFFIX_BYTES)
    if header_bytes != size - _SUFFIX_BYTES or data_bytes > start:
        return None
    covered = buffer[start + _PREFIX.size : end - _CRC.size]
    if zlib.crc32(covered) != _CRC.unpack_from(buffer, end - _CRC.size)[0]:
        return None
    header_json = buffer[start + _PREFIX.size : end - _SUFFIX_BYTES]
    try:
        if _decode_kind(header_json).footer:
            return Footer(_decode_footer(header_json), start, end)
        return Batch(_decode_header(header_json), start - data_bytes, start, end)
    except msgspec.DecodeError:
        return None


def scan(buffer: bytes | memoryview) -> Iterator[Batch | Footer | Damage]:
    """Yield everything in a run of batches from front to back; what belongs to no whole batch comes as `Damage`.

    Never decompresses: each trailer is found by walking the data frame's block headers, after damage by magic and crc.
    """
    position, end = 0, len(buffer)
    while position < end:
        found = _read_at(buffer, position, end) or _find_next(buffer, position, end)
        if found is None:
            yield Damage(position, end)
            return
        if found.start > position:
            yield Damage(position, found.start)
        yield found
        position = found.end


def scan_back(buffer: bytes | memoryview) -> Iterator[Batch | Footer]:
    """Yield every whole batch and footer from back to front; a torn tail and spoilt batches are passed over.

    Reads trailers only, so the last batches of a large file cost next to nothing.
    """
    end = len(buffer)
    while end > 0:
        found = read_last(buffer, end) or _find_previous(buffer, end)
        if found is None:
            return
        yield found
        end = found.start


def _read_at(buffer: bytes | memoryview, position: int, end: int) -> Batch | Footer | None:
    """Return the batch or footer that begins exactly at `position`."""
    trailer = _data_frame_end(buffer, position, end)
    if trailer is None:
        return None
    found = _read_trailer(buffer, trailer, end)
    return found if found is not None and found.start == position else None


def _find_next(buffer: bytes | memoryview, position: int, end: int) -> Batch | Footer | None:
    """Return the first whole batch or footer that begins at or behind `position`."""
    start = position
    while position < end:
        window = bytes(buffer[position : min(position + _SEARCH_BYTES, end)])
        offset = window.find(_MAGIC_BYTES)
        while offset >= 0:
            found = _read_trailer(buffer, position + offset, end)
            if found is not None and found.start >= start:
                return found
            offset = window.find(_MAGIC_BYTES, offset + 1)
        position += max(1, len(window) - len(_MAGIC_BYTES) + 1)
    return None


def _find_previous(buffer: bytes | memoryview, end: int) -> Batch | Footer | None:
    """Return the last whole batch or footer that ends at or before `end`."""
    upper = end
    while upper > 0:
        lower = max(0, upper - _SEARCH_BYTES)
        window = bytes(buffer[lower:upper])
        offset = window.rfind(_MAGIC_BYTES)
        while offset >= 0:
            found = _read_trailer(buffer, lower + offset, end)
            if found is not None:
                return found
            offset = window.rfind(_MAGIC_BYTES, 0, offset + len(_MAGIC_BYTES) - 1)
        upper = lower + len(_MAGIC_BYTES) - 1 if lower > 0 else 0
    return None


def _data_frame_end(buffer: bytes | memoryview, start: int, end: int) -> int | None:
    """Return where the zstd frame at `start` ends (RFC 8878, 3.1.1); `start` itself where a trailer stands there."""
    if bytes(buffer[start : start + 4]) == _MAGIC_BYTES:
        return start
    try:
        frame = zstandard.get_frame_parameters(bytes(buffer[start : start + 18]))
        position = start + zstandard.frame_header_size(bytes(buffer[start : start + 18]))
    except zstandard.ZstdError:
        return None
    while position + 3 <= end:
        block = int.from_bytes(buffer[position : position + 3], "little")
        last, kind, size = block & 1, (block >> 1) & 3, block >> 3
        position += 3 + (1 if kind == 1 else size)
        if last:
            position += 4 if frame.has_checksum else 0
            return position if position <= end else None
    return None


def decode_records(buffer: bytes | memoryview, batch: Batch) -> bytes:
    """Decompress a batch's records and check them against the header.

    Raises `BatchDamagedError`, naming the batch, for lengths beyond the limits (before anything is allocated), a frame
    that does not decompress to the stated length, or another SHA-256 or number of records than the header states.
    """
    header = batch.header
    data = buffer[batch.start : batch.data_end]
    if header.bytes > MAX_RECORDS_BYTES:
        raise _damaged(header, f"states {header.bytes} bytes of records, over the limit of {MAX_RECORDS_BYTES}")
    try:
        if _data_frame_end(data, 0, len(data)) != len(data):  # other readers would stumble over the rest
            raise _damaged(header, "its frame is not as long as its trailer says")
        size = zstandard.frame_content_size(data)
        if size != header.bytes:
            raise _damaged(header, f"its frame holds {size} bytes, its header says {header.bytes}")
        records = zstandard.ZstdDecompressor().decompress(data, max_output_size=header.bytes)
    except zstandard.ZstdError as error:
        raise _damaged(header, str(error)) from error
    if hashlib.sha256(records).hexdigest() != header.sha256:
        raise _damaged(header, "its records have another sha256 than its header says")
    lines = records.count(b"\n")
    if lines != header.records:
        raise _damaged(header, f"holds {lines} records, its header says {header.records}")
    return records


def is_whole(buffer: bytes | memoryview, batch: Batch) -> bool:
    """Tell whether a batch's records are what its header says."""
    try:
        decode_records(buffer, batch)
    except BatchDamagedError:
        return False
    return True


def read_whole(data: bytes) -> Batch | None:
    """Return the batch that `data` is, all of it and nothing else; None where it is no whole one."""
    batch = read_last(data)
    return batch if isinstance(batch, Batch) and batch.start == 0 and is_whole(data, batch) else None


def _damaged(header: BatchHeader, reason: str) -> BatchDamagedError:
    first, last = header.span
    numbers = f"{first}" if first == last else f"{first}-{last}"
    return BatchDamagedError(
        f"batch {header.conn}/{header.channel}/{numbers} is damaged: {reason}",
        do="Its other copies (spool, stream) may still hold it: run `ssmd day verify`.",
    )
