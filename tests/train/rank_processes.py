"""Two ranks in processes of their own, which stay and wait for work.

Not in conftest.py: there are several of that name, and a process finds its work by module.
"""

import gc
import os
import traceback
from unittest import mock

import torch
import torch.distributed as dist
from torch import multiprocessing

from dist_tl.train.engine import join_group

PATIENCE_S = 120.0


def join_on_cpu(rank, world_size, **fields):
    """Join a group and get DeepSpeed ready, without a GPU where there is one: ranks share it."""
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with mock.patch.object(torch.cuda, "is_available", return_value=False):
        join_group(rank, world_size, **fields)
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu"):
        import deepspeed  # noqa: F401
    # ZeRO-3 collects garbage for every engine: half a second among all that has been imported.
    gc.collect()
    gc.freeze()


def _serve(rank, rendezvous, orders, answers):
    torch.set_num_threads(1)
    join_on_cpu(rank, 2, rendezvous=rendezvous, timeout_s=PATIENCE_S)
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
            context.Process(
                target=_serve, args=(rank, f"file://{folder}/meet", *pipes), daemon=True
            )
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
