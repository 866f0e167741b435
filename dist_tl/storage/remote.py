"""Objects behind fsspec: S3 and what speaks like it, memory for tests, other clouds unchanged.

Connections are made late and belong to one process and one set of credentials, so a store can be
pickled, forked and sent anywhere. Trying again happens here and nowhere below.

Not covered: validation of keys and the wording of errors, which `objects.py` does for every store.
"""

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

_S3 = {"s3", "s3a"}
_WAITS_S = (0.2, 0.5, 1.2, 3.0)  # between tries; about five seconds bridge a server's restart

_TRANSIENT_CODES = {"SlowDown", "RequestTimeout", "Throttling", "ConditionalRequestConflict"}
_CREDENTIAL_ERRORS = {
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError",
    "InvalidAccessKeyId", "SignatureDoesNotMatch", "AccessDenied", "ExpiredToken", "InvalidToken",
    "401", "403",
}  # fmt: skip

_filesystems: dict[tuple[str, int, str], Any] = {}


class RemoteFolder:
    """A prefix of an object store."""

    def __init__(self, protocol: str, root: str) -> None:
        self._protocol = protocol
        self._root = root

    def filesystem(self) -> Any:
        """The fsspec file system behind it, connected anew in every process."""
        return _make_filesystem(self._protocol)

    def read(self, key: str) -> bytes | None:
        """The object's bytes, by one request so that they are of one version; None if missing."""
        options = {"max_concurrency": 1} if self._protocol in _S3 else {}
        try:
            return self._call("cat_file", self._path(key), **options)
        except FileNotFoundError as error:
            return _none_unless_bucket_missing(error)

    def write(self, key: str, data: bytes, *, create_only: bool) -> bool:
        """Put an object; False where `create_only` and the store says that the key is taken."""
        options: dict[str, Any] = {"mode": "create"} if create_only else {}
        if create_only and self._protocol in _S3:
            options["chunksize"] = 5 * 2**30  # one PUT: some stores ignore the condition on parts
        try:
            self._call("pipe_file", self._path(key), data, **options)
        except FileExistsError:
            if not create_only:
                raise
            return False
        return True

    def put_file(self, local: Path, key: str) -> None:
        """Upload a file."""
        self._call("put_file", str(local), self._path(key))

    def get_file(self, key: str, local: Path) -> None:
        """Download an object."""
        self._call("get_file", self._path(key), str(local))

    def size(self, key: str) -> int | None:
        """The object's length in bytes; None where there is no such object."""
        try:
            found = self._call("info", self._path(key))
        except FileNotFoundError as error:
            return _none_unless_bucket_missing(error)
        return found["size"] if found["type"] == "file" else None

    def keys(self, prefix: str) -> Iterator[str]:
        """Every key below `prefix`, in no particular order."""
        below = self._path(prefix)
        for name in self._call("find", below):
            path = name.lstrip("/")
            if path.startswith(f"{below}/" if below else "") and not path.endswith("/"):
                yield path[len(self._root) :].lstrip("/")

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        try:
            self._call("rm_file", self._path(key))
        except FileNotFoundError as error:
            _none_unless_bucket_missing(error)

    def delete_all(self, prefix: str) -> None:
        """Remove every object below `prefix`."""
        paths = [self._path(key) for key in self.keys(prefix)]
        if paths:
            self._call("rm", paths)

    def remedy(self, error: Exception) -> str:
        """What the user can do about an error of the store."""
        code = error_code(error)
        if isinstance(error, ImportError):
            return "install the package that fsspec needs for this kind of store"
        if self._protocol not in _S3:
            return "check its credentials, and that this machine can reach it"
        if code == "NoSuchBucket":
            return f"create the bucket or correct its name ({_endpoint()})"
        if code in _CREDENTIAL_ERRORS or isinstance(error, PermissionError):
            return (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, here and on every worker, to a "
                f"key that may list, read, write and delete in this bucket ({_endpoint()})"
            )
        if _is_connection_error(error):
            return f"check that the server runs and that this machine can reach it ({_endpoint()})"
        return f"try again later, or see the store's own log ({_endpoint()})"

    def _path(self, key: str) -> str:
        return "/".join(part for part in (self._root, key) if part)

    def _call(self, method: str, *args: Any, **options: Any) -> Any:
        for wait_s in (*_WAITS_S, None):
            try:
                return getattr(_connect(self._protocol), method)(*args, **options)
            except Exception as error:
                if error_code(error) in {"PreconditionFailed", "412"}:
                    raise FileExistsError(str(error)) from error
                if wait_s is None or not self._is_transient(error):
                    raise
                time.sleep(wait_s * (0.75 + secrets.randbelow(500) / 1000))
        raise AssertionError("the last try returns or raises")

    def _is_transient(self, error: Exception) -> bool:
        status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status is not None:
            return status in {429, 500, 502, 503, 504} or error_code(error) in _TRANSIENT_CODES
        return self._protocol in _S3 and _is_connection_error(error)


def _connect(protocol: str) -> Any:
    """The file system of this process, for the credentials that its environment holds now."""
    key = (protocol, os.getpid(), _environment_digest() if protocol in _S3 else "")
    found = _filesystems.get(key)
    if found is None:
        # Threads may race to this line. All of them get the first one's; the others' are dropped
        # before they connect to anything.
        found = _filesystems.setdefault(key, _make_filesystem(protocol))
        for old in list(_filesystems)[:-4]:
            _filesystems.pop(old, None)
    return found


def _make_filesystem(protocol: str) -> Any:
    if protocol not in _S3:
        return fsspec.filesystem(protocol)
    filesystem = fsspec.filesystem(
        protocol,
        skip_instance_cache=True,
        use_listings_cache=False,
        config_kwargs={
            "retries": {"total_max_attempts": 1},
            # Many servers answer a range read with the checksum of the whole object, which the
            # default would then refuse. Our own hashes are in the entries and commits.
            "request_checksum_calculation": "when_required",
            "response_checksum_validation": "when_required",
            "connect_timeout": 5,
            "read_timeout": 60,
        },
    )
    filesystem.retries = 1
    return filesystem


def _environment_digest() -> str:
    relevant = [item for item in os.environ.items() if item[0].startswith("AWS_")]
    return hashlib.sha256(repr(sorted(relevant)).encode()).hexdigest()


def _response(error: BaseException) -> dict[str, Any]:
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def error_code(error: BaseException) -> str:
    """The S3 error code behind `error`, or else the name of its class."""
    return str(_response(error).get("Error", {}).get("Code") or type(error).__name__)


def _none_unless_bucket_missing(error: FileNotFoundError) -> None:
    # s3fs says "not found" for both, but a missing bucket must not look like an empty one.
    if error_code(error) == "NoSuchBucket":
        raise error


def _is_connection_error(error: Exception) -> bool:
    # Imported here, since it costs half a second that only users of S3 should pay.
    from botocore.exceptions import ConnectionError as NoConnectionError
    from s3fs.core import S3_RETRYABLE_ERRORS

    known = (*S3_RETRYABLE_ERRORS, NoConnectionError, ConnectionError, TimeoutError)
    return isinstance(error, known)


def _endpoint() -> str:
    """Where S3 requests go, without a login that the address may carry."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return "AWS_ENDPOINT_URL is not set"
    scheme, host = urlsplit(url).scheme, urlsplit(url).netloc.rpartition("@")[2]
    if not host:
        return "AWS_ENDPOINT_URL is not of the form http://host:port"
    return f"AWS_ENDPOINT_URL is {scheme}://{host}"
