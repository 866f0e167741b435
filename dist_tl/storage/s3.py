"""File systems of s3fs: any S3 store as AWS_* describes it, and the embedded server of this run.

A store is reached in one way only. What other settings say about S3 is refused for an S3 store and
has no effect on the embedded server, so that no run is written to somebody else's bucket.
"""

import os
import re
import ssl

import fsspec
from aiobotocore.session import AioSession
from botocore.exceptions import BotoCoreError, ProfileNotFound
from fsspec.config import conf as fsspec_configuration
from s3fs import S3FileSystem

from dist_tl.errors import StorageError
from dist_tl.storage.embedded import ACCESS_KEY, ENDPOINT, SECRET

_FOREIGN = re.compile(r"FSSPEC_S3A?(_.*)?", re.IGNORECASE)
_CONFIG = {
    "retries": {"total_max_attempts": 1},
    # Many servers return the checksum of the whole object for a range read, which the default would
    # reject. Our own hashes are in the entries and commits.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    "connect_timeout": 5,
    "read_timeout": 60,
}


def open_s3(protocol: str) -> S3FileSystem:
    """Returns a new file system of the store that the AWS_* environment describes.

    Raises:
        StorageError: a setting is not used here, or names a profile or file that does not exist.
    """
    _refuse_settings_of_fsspec()
    _check_settings_of_aws()
    filesystem = fsspec.filesystem(
        protocol, skip_instance_cache=True, use_listings_cache=False, config_kwargs=_CONFIG
    )
    filesystem.retries = 1
    return filesystem


class EmbeddedFileSystem(S3FileSystem):
    """The embedded server that the environment of this process names.

    Takes no arguments, so a pickled one holds no credentials.

    Raises:
        StorageError: this process was not started by a run with `store: embedded`.
    """

    protocol = ()  # fsspec applies variables and files of the user by this name
    cachable = False
    retries = 1

    def __init__(self) -> None:
        missing = [name for name in (ENDPOINT, ACCESS_KEY, SECRET) if not os.environ.get(name)]
        if missing:
            raise StorageError(
                f"no embedded S3 server: {', '.join(missing)} not set; set `store: embedded` and "
                "a folder as `run:`, on a cluster that the run starts by itself"
            )
        super().__init__(
            endpoint_url=os.environ[ENDPOINT],
            key=os.environ[ACCESS_KEY],
            secret=os.environ[SECRET],
            client_kwargs={"region_name": "us-east-1", "verify": False},  # loopback without TLS
            config_kwargs={**_CONFIG, "proxies": {}},
            session=_deaf_session(),
            use_listings_cache=False,
        )


def _deaf_session() -> AioSession:
    """A session with the defaults of botocore, whatever the user's environment and files say."""
    defaults = {
        name: (None, None, default, conversion)
        for name, (_, _, default, conversion) in AioSession.SESSION_VARIABLES.items()
    }
    no_file = (None, None, os.devnull, None)
    return AioSession({**defaults, "config_file": no_file, "credentials_file": no_file})


def _refuse_settings_of_fsspec() -> None:
    """Refuses what fsspec would apply besides the AWS_* environment."""
    found = sorted(filter(_FOREIGN.fullmatch, os.environ))
    options = {**fsspec_configuration.get("s3", {}), **fsspec_configuration.get("s3a", {})}
    if options and not found:
        found = [f"{', '.join(sorted(options))} of s3 in ~/.config/fsspec or FSSPEC_CONFIG_DIR"]
    if found:
        raise StorageError(
            f"expected the S3 store in the AWS_* variables alone, got also {', '.join(found)}; "
            "unset it, and set AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def _check_settings_of_aws() -> None:
    """Checks what botocore reports late or without its name, or takes for a missing object."""
    session = AioSession()
    try:
        session.get_scoped_config()
    except ProfileNotFound:
        profile = _variable("AWS_DEFAULT_PROFILE", "AWS_PROFILE")
        raise StorageError(
            f"{profile}, but no such profile is in {session.get_config_variable('config_file')} "
            f"or {session.get_config_variable('credentials_file')}; add it, or unset the variable"
        ) from None
    except BotoCoreError as error:
        raise StorageError(f"the AWS configuration cannot be read: {error}; correct it") from None
    bundle = session.get_config_variable("ca_bundle")
    if bundle is None:
        bundle = os.environ.get("REQUESTS_CA_BUNDLE")
    if not bundle:  # botocore reports an empty one by its name
        return
    try:
        ssl.create_default_context(cafile=bundle)
    except OSError as error:  # also ssl.SSLError
        variable = _variable("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", value=bundle)
        raise StorageError(
            f"{variable}, but that is no readable file of certificates ({error}); correct it, or "
            "unset it to use the certificates of this machine"
        ) from None


def _variable(*names: str, value: str = "") -> str:
    """Returns "NAME is 'VALUE'" for the first variable that is set."""
    for name in names:
        if name in os.environ:
            return f"{name} is {os.environ[name]!r}"
    return f"ca_bundle of the AWS profile is {value!r}"
