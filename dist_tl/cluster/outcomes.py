"""What became of Ray's work: its value, the named error that it met, or that it was lost."""

from typing import Any

import ray

from dist_tl.errors import DistTLError, WorkerLost


def collect(ticket: Any, what: str) -> Any:
    """The value behind a ticket, or the values behind a list of them.

    Args:
        what: was asked for, for the message if it is lost.

    Raises:
        DistTLError: the named error that the work met.
        WorkerLost: its worker died more often than it may start again.
    """
    try:
        return ray.get(ticket)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DistTLError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise WorkerLost(f"{what} was lost: {error}; start the same job again") from None
