"""One rank in the test process, and two more in processes of their own, started once a session."""

import os
import traceback

os.environ.update(TORCHDYNAMO_DISABLE="1", DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing

from dist_tl.train.engine import join_group

PATIENCE_S = 120.0


@pytest.fixture(autouse=True)
def one_thread():
    """More threads than cores only wait for each other, and rounding depends on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# For the whole session: DeepSpeed keeps handles to the first group it sees.
@pytest.fixture(scope="session")
def alone():
    """A world of one in the test process."""
    join_group(0, 1)
    yield
    dist.destroy_process_group()


def _serve(rank, rendezvous, orders, answers):
    torch.set_num_threads(1)
    join_group(rank, 2, rendezvous=rendezvous, timeout_s=PATIENCE_S)
    while (order := orders.get()) is not None:
        function, arguments = order
        try:
            answers.put((function(rank, 2, *arguments), None))
        except BaseException:
            answers.put((None, traceback.format_exc()))
    dist.destroy_process_group()


class TwoRanks:
    """Two ranks that wait for work.

    Calling it with a module-level function of a test file runs `function(rank, 2, *arguments)` on
    both, and gives back their two results. What crosses must be plain values: a tensor would leave
    its file behind when its process ends.
    """

    def __init__(self, folder):
        context = multiprocessing.get_context("spawn")
        self._pipes = [(context.Queue(), context.Queue()) for _ in range(2)]
        self._processes = [
            context.Process(target=_serve, args=(rank, f"file://{folder}/meet", *pipes))
            for rank, pipes in enumerate(self._pipes)
        ]
        for process in self._processes:
            process.start()

    def __call__(self, function, *arguments):
        for orders, _ in self._pipes:
            orders.put((function, arguments))
        results = [answers.get(timeout=PATIENCE_S) for _, answers in self._pipes]
        for rank, (_, failure) in enumerate(results):
            assert failure is None, f"rank {rank}: {failure}"
        return [result for result, _ in results]

    def close(self):
        for orders, _ in self._pipes:
            orders.put(None)
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    ranks = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request):
    """Runs `function(rank, world_size, *arguments)` on every rank of worlds of one and of two."""
    if request.param == 2:
        return request.getfixturevalue("two_ranks")
    request.getfixturevalue("alone")
    return lambda function, *arguments: [function(0, 1, *arguments)]
