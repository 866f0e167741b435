"""Every error derives from a built-in, takes one message, and can be pickled.

Transfer through Ray: tests/cluster/test_trials.py.
"""

import pickle

import pytest

from dist_tl import errors
from dist_tl.errors import DistTLError

CLASSES = sorted(
    (v for v in vars(errors).values() if isinstance(v, type) and v.__module__ == errors.__name__),
    key=lambda c: c.__name__,
)
BUILT_IN = {
    "ConfigError": ValueError,
    "DataError": ValueError,
    "StorageError": OSError,
    "DamagedError": ValueError,
    "DamagedShardError": ValueError,
    "ShardError": ValueError,
    "ShardTimeoutError": TimeoutError,
    "CheckpointError": RuntimeError,
    "CheckpointNotFoundError": RuntimeError,
    "CheckpointMismatchError": RuntimeError,
    "WorkerError": RuntimeError,
    "SupersededError": RuntimeError,
    "WorkerLostError": RuntimeError,
    "HeadLostError": RuntimeError,
    "JobDeletedError": RuntimeError,
    "NumericsError": ArithmeticError,
    "NonFiniteLossError": ArithmeticError,
    "NotConvergedError": ArithmeticError,
    "NotEuclideanError": ArithmeticError,
}


def test_the_class_hierarchy_is_complete():
    assert {c.__name__ for c in CLASSES} == {"DistTLError", *BUILT_IN}
    assert all(issubclass(c, DistTLError) for c in CLASSES)


@pytest.mark.parametrize("name", BUILT_IN)
def test_an_error_can_be_caught_as_its_built_in(name):
    with pytest.raises(BUILT_IN[name], match="expected 3, got 4"):
        raise getattr(errors, name)("expected 3, got 4")


@pytest.mark.parametrize("kind", CLASSES)
def test_an_error_holds_only_its_message(kind):
    error = kind("expected 3, got 4; use 3")
    assert str(error) == "expected 3, got 4; use 3"
    assert error.args == ("expected 3, got 4; use 3",)
    assert kind.__init__ in {
        base.__init__ for base in kind.__mro__ if base.__module__ == "builtins"
    }


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_error_survives_pickling(kind, protocol):
    error = pickle.loads(pickle.dumps(kind("message"), protocol))  # noqa: S301
    assert type(error) is kind
    assert str(error) == "message"


@pytest.mark.parametrize("kind", CLASSES)
def test_every_error_documents_when_it_is_raised(kind):
    assert kind.__doc__.strip().endswith(".")
