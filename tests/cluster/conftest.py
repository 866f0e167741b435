"""One Ray for all tests of the cluster's parts."""

import os
from pathlib import Path

# Read by DeepSpeed and torch in this process and, inherited, in Ray's.
os.environ.update(TORCHDYNAMO_DISABLE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import pytest
import torch
from small_stages import RayOfThreads

from dist_tl.cluster import generators, pending
from dist_tl.cluster.config import SessionConfig
from dist_tl.cluster.session import RaySession
from dist_tl.storage.objects import ObjectStore

HERE = Path(__file__).parent
_open = []
# Inherited by Ray's workers, which find the work of test_tasks.py by its module.
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])


@pytest.fixture(scope="module")
def ray_local():
    """A Ray that the modules of this folder share."""
    if not _open:
        _open.append(RaySession(SessionConfig(num_cpus=8, object_store_mb=100)).__enter__())
    return _open[0]


# Not a fixture of the whole run: RAY_ADDRESS is set meanwhile, and tests elsewhere start clusters
# of their own.
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
    """Rounding depends on the number of threads; workers have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads(monkeypatch):
    """Generator pools whose actors are threads of this process."""
    stand_in = RayOfThreads()
    monkeypatch.setattr(generators, "ray", stand_in)
    monkeypatch.setattr(pending, "ray", stand_in)
    monkeypatch.setattr(generators, "POLL_S", 0.01)
    return stand_in
