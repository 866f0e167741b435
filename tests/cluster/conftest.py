"""One Ray for all tests of the cluster's parts."""

import os

# Read by DeepSpeed and torch in this process and, inherited, in Ray's.
os.environ.update(TORCHDYNAMO_DISABLE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import pytest
import torch

from dist_tl.cluster.config import SessionConfig
from dist_tl.cluster.session import RaySession
from dist_tl.storage.objects import ObjectStore


# For this folder only: RAY_ADDRESS is set meanwhile, and other tests start clusters of their own.
@pytest.fixture(scope="package")
def ray_local():
    with RaySession(SessionConfig(num_cpus=8, object_store_mb=100)) as session:
        yield session


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
