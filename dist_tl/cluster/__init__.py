"""Thin Ray shells: processes, retries and back-pressure, no arithmetic. Owns ray."""

import os
import secrets
from pathlib import Path


def _has_token() -> bool:
    """Whether the user has a token of Ray's, in one of the places where Ray looks for it."""
    named = any(os.environ.get(key) for key in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    return named or Path("~/.ray/auth_token").expanduser().is_file()


if not os.environ.get("RAY_ADDRESS"):
    # Ray reads these once, when it is imported, so they are set before any module here does. A
    # token of the user's is for a cluster that a job is handed to, and as good for a private one;
    # without one a private cluster gets a token of its own.
    if _has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    else:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
