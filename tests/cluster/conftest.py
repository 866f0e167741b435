"""Fixtures of the cluster tests; one Ray cluster is shared by all of them."""

import os
from pathlib import Path

# Read by DeepSpeed and torch in this process and, inherited, in Ray's.
os.environ.update(TORCHDYNAMO_DISABLE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import pytest
import torch
from small_stages import RayOfThreads

from dist_tl.cluster import generators, pending, roles
from dist_tl.cluster.config import SessionConfig
from dist_tl.cluster.session import RaySession
from dist_tl.storage.objects import ObjectStore

HERE = Path(__file__).parent
_open = []
# Inherited by Ray's workers, which import the task functions of test_tasks.py.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def ray_local():
    """The Ray cluster that the modules of this folder share."""
    if not _open:
        _open.append(RaySession(SessionConfig(num_cpus=8, object_store_mb=100)).__enter__())
    return _open[0]


# Not a session fixture: it sets RAY_ADDRESS, and tests of other folders start their own clusters.
@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    try:
        return (yield)
    finally:
        if _open and (nextitem is None or HERE not in nextitem.path.parents):
            _open.pop().close()


@pytest.fixture
def store(tmp_path):
    return ObjectStore(tmp_path / "run")


@pytest.fixture
def one_thread():
    """One torch thread, as in workers: rounding depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads(monkeypatch):
    """Generator pools run their actors as threads of this process."""
    stand_in = RayOfThreads()
    for module in (generators, pending, roles):
        monkeypatch.setattr(module, "ray", stand_in)
    monkeypatch.setattr(generators, "POLL_S", 0.01)
    return stand_in
