"""All errors that users of dist_tl can see.

Each class also derives from the built-in exception that a caller would expect and takes a single
message, so that Ray can pickle it. A message says what was expected, what was received, and how to
fix it.
"""

from typing import Self


class DistTLError(Exception):
    """Base class of all errors that dist_tl raises deliberately."""


class ConfigError(DistTLError, ValueError):
    """Raised if a job, an option or the data it names is invalid, before any actor starts."""


class DataError(DistTLError, ValueError):
    """Raised if a data set exists but is unusable, e.g. an unreadable image or an empty class."""


class StorageError(DistTLError, OSError):
    """Raised if the object store rejects a request, is unreachable, or lost a committed object."""


class DamagedError(DistTLError, ValueError):
    """Raised if a stored object is missing, altered or cut short.

    Attributes:
        marker: key of the marker that made the object exist; once it is deleted, the same job
            makes the object again. Empty if the run cannot make it again.
    """

    marker = ""

    @classmethod
    def of(cls, message: str, marker: str) -> Self:
        """Returns the error of an object with this marker."""
        error = cls(message)
        error.marker = marker  # Ray and pickle keep it
        return error


class ShardError(DistTLError, ValueError):
    """Raised if a shard does not match its entry: truncated, altered, or of an unknown format."""


class DamagedShardError(DamagedError, ShardError):
    """Raised if a shard or its entry is damaged; a run generates it again from its order."""


class ShardTimeoutError(ShardError, TimeoutError):
    """Raised if a shard is not committed before the timeout: its generators are slow or died."""


class CheckpointError(DistTLError, RuntimeError):
    """Raised if a checkpoint cannot be written or read."""


class CheckpointNotFoundError(CheckpointError):
    """Raised if a checkpoint is requested but none is committed."""


class CheckpointMismatchError(CheckpointError):
    """Raised if a committed checkpoint is from another job, model or number of workers."""


class WorkerError(DistTLError, RuntimeError):
    """Raised if a Ray worker cannot start, or died more often than it may be restarted."""


class SupersededError(WorkerError):
    """Raised if a later attempt of the same run has started: this attempt stops."""


class WorkerLostError(WorkerError):
    """Raised if a worker or its node died; its task can be retried on another worker."""


class HeadLostError(WorkerError):
    """Raised if the head of the cluster died; another attempt resumes from the last checkpoint."""


class JobDeletedError(WorkerError):
    """Raised if the job was deleted while it was monitored; it is not restarted."""


class NumericsError(DistTLError, ArithmeticError):
    """Raised if a computation produces NaN or infinity, or leaves its domain."""


class NonFiniteLossError(NumericsError):
    """Raised if the loss is NaN or infinite; the message names the step."""


class NotConvergedError(NumericsError):
    """Raised if an iteration does not converge in time; its last iterate is not returned."""


class NotEuclideanError(NumericsError):
    """Raised if no points in a Euclidean space have the given distances."""
