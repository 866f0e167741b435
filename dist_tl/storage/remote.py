"""Objects behind fsspec: S3 and compatible stores, memory for tests, and other clouds.

Connections are created lazily, per process and per set of credentials, so that stores can be
pickled and forked. All retries happen here; those of the client libraries are disabled.

Not covered: validation of keys and error messages, which `objects.py` provides for all stores.
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

from dist_tl.storage import embedded
from dist_tl.storage.local import advice_if_unwritable

_S3 = {"s3", "s3a", embedded.PROTOCOL}
_READ_BY_S3 = ("AWS_", "FSSPEC_", "REQUESTS_CA_BUNDLE", *embedded.VARIABLES)
_WAITS_S = (0.2, 0.5, 1.2, 3.0)  # between retries; about 5 s in total, a server's restart

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
        """Returns a new fsspec file system, which reconnects in every process."""
        return _make_filesystem(self._protocol)

    def read(self, key: str) -> bytes | None:
        """Returns the object's bytes in one request (one version), or None if missing."""
        options = {"max_concurrency": 1} if self._protocol in _S3 else {}
        try:
            return self._call("cat_file", self._path(key), **options)
        except FileNotFoundError as error:
            _raise_if_bucket_missing(error)
            return None

    def write(self, key: str, data: bytes, *, create_only: bool) -> bool:
        """Writes an object. Returns False if `create_only` and the key exists in the store."""
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
        """Uploads a file."""
        self._call("put_file", str(local), self._path(key))

    def get_file(self, key: str, local: Path) -> None:
        """Downloads an object."""
        self._call("get_file", self._path(key), str(local))

    def size(self, key: str) -> int | None:
        """Returns the object's size in bytes, or None if it does not exist."""
        try:
            info = self._call("info", self._path(key))
        except FileNotFoundError as error:
            _raise_if_bucket_missing(error)
            return None
        return info["size"] if info["type"] == "file" else None

    def keys(self, prefix: str) -> Iterator[str]:
        """Yields all keys below `prefix`, in no particular order."""
        below = self._path(prefix)
        for name in self._call("find", below):
            path = name.lstrip("/")
            if path.startswith(f"{below}/" if below else "") and not path.endswith("/"):
                yield path[len(self._root) :].lstrip("/")

    def delete(self, key: str) -> None:
        """Deletes an object, if it exists."""
        try:
            self._call("rm_file", self._path(key))
        except FileNotFoundError as error:
            _raise_if_bucket_missing(error)

    def delete_all(self, prefix: str) -> None:
        """Deletes all objects below `prefix`."""
        paths = [self._path(key) for key in self.keys(prefix)]
        if paths:
            self._call("rm", paths)

    def remedy(self, error: Exception) -> str:
        """Returns advice on how to fix an error of the store."""
        code = error_code(error)
        if isinstance(error, ImportError):
            return "install the package that fsspec needs for this kind of store"
        if self._protocol == embedded.PROTOCOL:
            served = os.environ.get(embedded.FOLDER)
            if served and (advice := advice_if_unwritable(Path(served))):
                return f"the embedded store cannot write to {advice}"
            return (
                "the embedded S3 server of this run refuses or has stopped: start the same job "
                "again to resume"
            )
        if self._protocol not in _S3:
            return "check the credentials, and that this machine can reach the store"
        if code == "NoSuchBucket":
            return f"create the bucket or correct its name ({_endpoint()})"
        if code in _CREDENTIAL_ERRORS or isinstance(error, PermissionError):
            return (
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, here and on every worker, to a "
                f"key that may list, read, write and delete in this bucket ({_endpoint()})"
            )
        if _is_connection_error(error):
            return f"check that the server runs and that this machine can reach it ({_endpoint()})"
        return f"try again later, or read the store's own log ({_endpoint()})"

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
        raise AssertionError("the last attempt returns or raises")

    def _is_transient(self, error: Exception) -> bool:
        status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status is not None:
            return status in {429, 500, 502, 503, 504} or error_code(error) in _TRANSIENT_CODES
        return self._protocol in _S3 and _is_connection_error(error)


def _connect(protocol: str) -> Any:
    """Returns the file system of this process for the current credentials in its environment."""
    key = (protocol, os.getpid(), _environment_digest() if protocol in _S3 else "")
    filesystem = _filesystems.get(key)
    if filesystem is None:
        # If threads race here, all of them use the first file system; the others are dropped before
        # they connect.
        filesystem = _filesystems.setdefault(key, _make_filesystem(protocol))
        for old in list(_filesystems)[:-4]:
            _filesystems.pop(old, None)
    return filesystem


def _make_filesystem(protocol: str) -> Any:
    if protocol not in _S3:
        return fsspec.filesystem(protocol)
    # Imported lazily: the import takes half a second and only S3 needs it.
    from dist_tl.storage import s3

    return s3.EmbeddedFileSystem() if protocol == embedded.PROTOCOL else s3.open_s3(protocol)


def _environment_digest() -> str:
    relevant = [item for item in os.environ.items() if item[0].startswith(_READ_BY_S3)]
    return hashlib.sha256(repr(sorted(relevant)).encode()).hexdigest()


def _response(error: BaseException) -> dict[str, Any]:
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return response
    return {}


def error_code(error: BaseException) -> str:
    """Returns the S3 error code of `error`, or else the name of its class."""
    return str(_response(error).get("Error", {}).get("Code") or type(error).__name__)


def _raise_if_bucket_missing(error: FileNotFoundError) -> None:
    # s3fs raises the same error for both, but a missing bucket must not look like an empty one.
    if error_code(error) == "NoSuchBucket":
        raise error


def _is_connection_error(error: Exception) -> bool:
    # Imported lazily, as in `_make_filesystem`.
    from botocore.exceptions import ConnectionError as NoConnectionError
    from s3fs.core import S3_RETRYABLE_ERRORS

    known = (*S3_RETRYABLE_ERRORS, NoConnectionError, ConnectionError, TimeoutError)
    return isinstance(error, known)


def _endpoint() -> str:
    """Returns a description of the S3 endpoint, without credentials in its address."""
    url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return "AWS_ENDPOINT_URL is not set"
    scheme, host = urlsplit(url).scheme, urlsplit(url).netloc.rpartition("@")[2]
    if not host:
        return "AWS_ENDPOINT_URL is not of the form http://host:port"
    return f"AWS_ENDPOINT_URL is {scheme}://{host}"
