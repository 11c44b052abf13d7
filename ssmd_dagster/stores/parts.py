"""Large files onto S3, in parts: memory holds a few of them, and one conditional request makes them an object.

The object store's own client puts a file in parts only where it may overwrite. Not for what fits into one request.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

CONNECT_TIMEOUT_S = 3.0
PART_TIMEOUT_S = 120.0
ATTEMPTS = 4
"""Of every request, the first one included."""
PART_BYTES = 16 * 1024 * 1024
MOST_PARTS = 9_000
"""S3 takes 10,000; a larger file has larger parts."""
SIDE_BY_SIDE = 4

_log = logging.getLogger(__name__)


def open_client(*, region: str, endpoint: str | None, access_key_id: str | None, secret_access_key: str | None) -> Any:
    """Open a client of S3; nothing is asked of it yet. Without a key the machine's own credentials are looked for."""
    return boto3.client(
        "s3",
        region_name=region,
        endpoint_url=endpoint,
        aws_access_key_id=access_key_id,
        aws_secret_access_key=secret_access_key,
        config=Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=PART_TIMEOUT_S,
            retries={"mode": "standard", "total_max_attempts": ATTEMPTS},
            max_pool_connections=SIDE_BY_SIDE,
        ),
    )


def create_in_parts(client: Any, bucket: str, key: str, path: Path) -> None:
    """Write a file as an object that must not be there yet; on failure the parts are taken away again.

    Raises:
        ClientError: The service refuses; its status is in the answer, 412 where there is such an object.
        BotoCoreError: The service does not answer.
    """
    size = path.stat().st_size
    part_bytes = max(PART_BYTES, -(-size // MOST_PARTS))
    place = {"Bucket": bucket, "Key": key}
    place["UploadId"] = client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")["UploadId"]

    def send(number: int) -> dict[str, Any]:
        with path.open("rb") as file:
            file.seek((number - 1) * part_bytes)
            body = file.read(part_bytes)
        sent = client.upload_part(**place, PartNumber=number, Body=body, ChecksumAlgorithm="SHA256")
        return {"PartNumber": number, "ETag": sent["ETag"], "ChecksumSHA256": sent["ChecksumSHA256"]}

    with ExitStack() as on_failure:
        on_failure.callback(_abort, client, place)
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            sending = [pool.submit(send, number) for number in range(1, -(-size // part_bytes) + 1)]
            try:
                parts = [future.result() for future in sending]
            finally:
                pool.shutdown(cancel_futures=True)
        client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
        on_failure.pop_all()


def status_of(error: ClientError) -> int:
    """Return the HTTP status of an answer, 0 where it had none."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _abort(client: Any, place: Mapping[str, str]) -> None:
    try:
        client.abort_multipart_upload(**place)
    except (ClientError, BotoCoreError) as error:
        _log.warning("parts of s3://%s/%s are left over: %s", place["Bucket"], place["Key"], error)
