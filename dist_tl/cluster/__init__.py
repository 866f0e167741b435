"""Ray actors and tasks: processes, retries and back-pressure. Only this package imports ray."""

import os
import secrets
from pathlib import Path

# Ray's own switch of clusters of several machines, read on every platform. Where it is on, Ray
# replaces 127.0.0.1 by the address of this machine and listens on all interfaces.
SEVERAL_MACHINES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


def _has_token() -> bool:
    """Whether Ray finds a token in the environment or in the home folder."""
    in_environment = any(os.environ.get(key) for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return in_environment or Path("~/.ray/auth_token").expanduser().is_file()


def is_on_loopback() -> bool:
    """Whether other machines cannot connect to a private cluster."""
    return os.environ.get(SEVERAL_MACHINES, "").lower() not in {"1", "true", ""}


# Ray reads these variables when it is imported, so they are set before any module imports it.

# Ray's failure signal handler takes SIGTERM for a crash: it aborts the driver with a stack dump.
os.environ.setdefault("RAY_DISABLE_FAILURE_SIGNAL_HANDLER", "1")
if not os.environ.get("RAY_ADDRESS"):
    # A private cluster uses the user's token if there is one, or else a random token.
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    else:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.setdefault(SEVERAL_MACHINES, "0")
