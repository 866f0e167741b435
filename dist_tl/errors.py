"""Every error a user of dist_tl can meet.

Each class is also the built-in that a caller would expect, and takes one message and nothing
else, so that it survives the trip through Ray. A message says what was expected, what came, and
what to do.
"""


class DistTLError(Exception):
    """Root of all errors that dist_tl raises on purpose."""


class ConfigError(DistTLError, ValueError):
    """A job, an option or the data it names cannot work. Raised before any actor starts."""


class DataError(DistTLError, ValueError):
    """A data set exists but cannot be used: an unreadable image, an empty class."""


class StorageError(DistTLError, OSError):
    """The object store refused, is unreachable, or lost what it had acknowledged."""


class ShardError(DistTLError, ValueError):
    """A shard is not what its entry says: truncated, altered, or of an unknown format."""


class ShardTimeoutError(ShardError, TimeoutError):
    """A shard was not committed in time: the generators fell too far behind or died."""


class CheckpointError(DistTLError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointNotFoundError(CheckpointError):
    """No committed checkpoint exists where one was asked for."""


class CheckpointMismatchError(CheckpointError):
    """A committed checkpoint belongs to another job, model or number of workers."""


class WorkerError(DistTLError, RuntimeError):
    """A Ray worker died more often than it may be restarted, or could not start."""


class SupersededError(WorkerError):
    """A later start of the same run has taken it over."""


class WorkerLostError(WorkerError):
    """A worker died, or its node did; what it was asked for may be asked of another."""


class HeadLostError(WorkerError):
    """The head of a job's cluster died; another attempt goes on from the last COMMIT."""


class JobDeletedError(WorkerError):
    """Somebody deleted the job while it was followed: no reason to start it again."""


class NumericsError(DistTLError, ArithmeticError):
    """A computation left the finite numbers or its domain."""


class NonFiniteLossError(NumericsError):
    """The loss became NaN or infinite; the message names the step."""


class NotConvergedError(NumericsError):
    """An iteration ran out of steps. Its last iterate is never returned."""


class NotEuclideanError(NumericsError):
    """Distances that no points in a Euclidean space have."""
