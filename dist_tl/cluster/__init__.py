"""Thin Ray shells: processes, retries and back-pressure, no arithmetic. Owns ray."""

import os
import secrets

if not os.environ.get("RAY_ADDRESS"):
    # Ray reads these once, when it is imported, so they are set before any module here does: a
    # private cluster gets a token of its own.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
