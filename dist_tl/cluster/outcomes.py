"""Results of Ray tasks: the value, the named error of the task, or a lost worker."""

from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from dist_tl.errors import DistTLError, WorkerError, WorkerLostError


def collect(ref: Any, label: str) -> Any:
    """Returns the value of an object ref, or the values of a list of refs.

    Args:
        label: names the work in error messages.

    Raises:
        DistTLError: the named error that the work raised.
        WorkerError: the work raised another error, which the message shows.
        WorkerLostError: the worker died more often than it may be restarted.
    """
    try:
        return ray.get(ref)
    except RayTaskError as error:
        raise unwrap_error(error, label) from None
    except RayError as error:
        raise WorkerLostError(f"{label} was lost: {error}; start the same job again") from None


def unwrap_error(error: RayTaskError, label: str) -> DistTLError:
    """Returns the DistTLError that Ray wrapped, or a WorkerError around another cause."""
    if isinstance(error.cause, DistTLError):
        return error.cause
    return WorkerError(
        f"{label} failed with {error.cause!r}; fix the cause and start the same job again to "
        f"resume. Traceback:\n{error}"
    )
