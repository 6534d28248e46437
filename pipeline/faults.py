"""What the layers below storage raise, sorted into the branches of StorageError.

The one place where faults of s3fs, botocore, aiohttp and the operating system get their name and
their one line, which holds the URI and nothing secret. Deadlines and retries belong here too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from pipeline.errors import (
    ChangedError,
    CredentialsError,
    NotFoundError,
    StorageError,
    TransientError,
)
from pipeline.uri import is_s3

_CREDENTIALS_CODES = {
    "400",  # a HEAD has no body, so an expired token (400) arrives without its name
    "401",
    "403",
    "AuthorizationHeaderMalformed",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
}
_TRANSIENT_CODES = {
    "429",
    "500",
    "502",
    "503",
    "504",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
}


@contextlib.contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Sorts every fault of the layers below into the branches of StorageError.

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

    return (OSError, aiohttp.ClientError, asyncio.TimeoutError, BotoCoreError, ClientError)


def sort_fault(uri: str, error: Exception) -> StorageError:
    """The StorageError for a fault; texts of servers are left out, they may quote requests."""
    code = error_code(error)
    kind = type(error).__name__
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) or code == "404":
        return NotFoundError(f"{uri}: not found")
    if kind == "FileExpired" or code in ("PreconditionFailed", "412"):
        return ChangedError(f"{uri}: overwritten while it was being read")
    if code == "InvalidObjectState":
        return StorageError(f"{uri}: archived: restore it from cold storage first")
    if not is_s3(uri):
        return StorageError(f"{uri}: {error.strerror or kind}")  # type: ignore[attr-defined]
    if kind in ("NoCredentialsError", "PartialCredentialsError"):
        return CredentialsError(
            f"{uri}: no complete AWS credentials: set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        )
    credentials = ("Credential", "Token", "SSO", "ProfileNotFound", "UnauthorizedSSO")
    if isinstance(error, PermissionError) or code in _CREDENTIALS_CODES:
        return CredentialsError(
            f"{uri}: access denied ({code or kind}): check the AWS credentials, their expiry, "
            "the region and the bucket's policy"
        )
    if kind.startswith(credentials):
        return CredentialsError(f"{uri}: the AWS credentials cannot be obtained ({kind})")
    return _sort_remote_fault(uri, error, code or kind)


def _sort_remote_fault(uri: str, error: Exception, code: str) -> StorageError:
    import asyncio

    import aiohttp
    from botocore.exceptions import ConnectionError as BotoConnectionError
    from botocore.exceptions import HTTPClientError

    passing = (
        aiohttp.ClientError,
        asyncio.TimeoutError,
        BotoConnectionError,
        ConnectionError,
        HTTPClientError,
        TimeoutError,
    )
    if code in _TRANSIENT_CODES or isinstance(error, passing):
        return TransientError(f"{uri}: the storage does not answer as it should ({code})")
    return StorageError(f"{uri}: the storage refused ({code})")


def error_code(error: BaseException | None) -> str:
    """S3's error code ("SlowDown", "403"), which s3fs keeps on the cause; "" without one."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
        error = error.__cause__
    return ""
