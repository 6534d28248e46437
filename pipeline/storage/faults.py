"""Faults of the layers below storage, sorted into the branches of StorageError.

Faults of aiohttp, botocore and the operating system get their class and their one line here. The
line holds the URI and nothing secret. `retry` decides about further attempts.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

from pipeline.errors import (
    ChangedError,
    CredentialsError,
    NotFoundError,
    StorageError,
    TransientError,
)
from pipeline.storage.uri import is_s3

# Codes count where the HTTP status alone does not tell: most of these come with 400, and a
# deletion of many objects answers 200 with a code for each object that is still there.
_NOT_FOUND_CODES = {"404", "NoSuchBucket", "NoSuchKey", "NoSuchUpload", "NoSuchVersion"}
_CREDENTIALS_CODES = {
    "400",  # a HEAD has no body, so an expired token (400) arrives without its name
    "AccessDenied",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidAccessKeyId",
    "InvalidToken",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
_TRANSIENT_CODES = {
    "BadDigest",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "KMS.ThrottlingException",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
# Of the operating system: a network mount that is away, or a machine that is short of something.
_TRANSIENT_ERRNOS = {
    *(errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOBUFS),
    *(errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}


@contextlib.contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Sort every fault of the layers below into the branches of StorageError.

    FileExistsError passes: it is the answer of a create-only write, not a fault.
    """
    try:
        yield
    except FileExistsError:
        raise
    except _faults(uri) as error:
        raise sort_fault(uri, error) from error


def _faults(uri: str) -> tuple[type[Exception], ...]:
    if not is_s3(uri):
        return (OSError,)
    import asyncio

    import aiohttp
    from botocore.exceptions import BotoCoreError, ClientError
    from botocore.parsers import ResponseParserError

    of_aio = (aiohttp.ClientError, asyncio.TimeoutError)
    return (OSError, BotoCoreError, ClientError, ResponseParserError, *of_aio)


def sort_fault(uri: str, error: Exception) -> StorageError:
    """The StorageError for a fault; texts of servers are left out, they may quote requests."""
    kind = type(error).__name__
    if not is_s3(uri):
        if isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return NotFoundError(f"{uri}: not found")
        return _sort_local(uri, error, kind)
    code, status = error_code(error)
    if code:
        return sort_code(uri, code, status)
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return CredentialsError(
            f"{uri}: no complete AWS credentials: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    if kind.startswith(("Credential", "Token", "SSO", "ProfileNotFound", "UnauthorizedSSO")):
        return CredentialsError(f"{uri}: the AWS credentials cannot be obtained ({kind})")
    return _sort_broken_answer(uri, error, kind)


def _sort_local(uri: str, error: Exception, kind: str) -> StorageError:
    """For a fault of the operating system."""
    said = getattr(error, "strerror", None) or kind
    if isinstance(error, PermissionError):
        return CredentialsError(f"{uri}: {said}: check who may read and write there")
    passing = getattr(error, "errno", None) in _TRANSIENT_ERRNOS
    return (TransientError if passing else StorageError)(f"{uri}: {said}")


def sort_code(uri: str, code: str, status: int = 200) -> StorageError:
    """The StorageError for S3's error code and the HTTP status it came with."""
    if code in _NOT_FOUND_CODES or status == 404:
        return NotFoundError(f"{uri}: not found")
    if code == "PreconditionFailed" or status == 412:
        return ChangedError(f"{uri}: overwritten while it was being read")
    if code == "InvalidObjectState":
        return StorageError(f"{uri}: archived: restore it from cold storage first")
    if code in _TRANSIENT_CODES or status in (408, 429, 500, 502, 503, 504):
        return TransientError(f"{uri}: the storage does not answer as it should ({code})")
    if code in _CREDENTIALS_CODES or status in (401, 403):
        return CredentialsError(
            f"{uri}: access denied ({code}): check the AWS credentials, their expiry, "
            "the region and the bucket's policy"
        )
    return StorageError(f"{uri}: the storage refused ({code})")


def _sort_broken_answer(uri: str, error: Exception, kind: str) -> StorageError:
    """Faults without an answer of S3: no connection, a timeout, or an answer cut short."""
    import asyncio

    import aiohttp
    from botocore.exceptions import (
        ConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
        SSLError,
    )
    from botocore.parsers import ResponseParserError

    if isinstance(error, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return StorageError(f"{uri}: the storage's certificate cannot be verified")
    passing = (
        aiohttp.ClientError,
        asyncio.TimeoutError,
        ConnectionError,
        FlexibleChecksumError,
        HTTPClientError,
        IncompleteReadError,
        OSError,
        ResponseParserError,
    )
    if isinstance(error, passing):
        return TransientError(f"{uri}: the storage does not answer as it should ({kind})")
    return StorageError(f"{uri}: the storage cannot be used ({kind})")


def error_code(error: BaseException) -> tuple[str, int]:
    """S3's error code ("SlowDown") and the HTTP status; ("", 0) without an answer of S3."""
    response: Any = getattr(error, "response", None)
    if not isinstance(response, dict):
        return "", 0
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code") or status), status
