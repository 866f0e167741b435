"""What became of Ray's work: its value, the named error that it met, or that it was lost."""

from typing import Any

import ray

from dist_tl.errors import DistTLError, WorkerError, WorkerLostError


def collect(ticket: Any, what: str) -> Any:
    """The value behind a ticket, or the values behind a list of them.

    Args:
        what: was asked for, for the message if it is lost.

    Raises:
        DistTLError: the named error that the work met.
        WorkerError: it met another error, which is shown.
        WorkerLost: its worker died more often than it may start again.
    """
    try:
        return ray.get(ticket)
    except ray.exceptions.RayTaskError as error:
        raise named(error, what) from None
    except ray.exceptions.RayError as error:
        raise WorkerLostError(f"{what} was lost: {error}; start the same job again") from None


def named(error: ray.exceptions.RayTaskError, what: str) -> DistTLError:
    """The error of ours behind Ray's, which only looks like it."""
    if isinstance(error.cause, DistTLError):
        return error.cause
    return WorkerError(
        f"{what} failed with {error.cause!r}; the same job goes on once that is mended. Where it "
        f"failed:\n{error}"
    )
