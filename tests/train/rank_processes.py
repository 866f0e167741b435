"""Two ranks in long-lived processes.

Not in conftest.py, since several modules have that name, and a process imports functions by module.
"""

import traceback

import torch
import torch.distributed as dist
from one_rank import join_on_cpu
from torch import multiprocessing

TIMEOUT_S = 120.0


def _serve(rank, rendezvous, calls, results):
    torch.set_num_threads(1)
    join_on_cpu(rank, 2, rendezvous=rendezvous, timeout_s=TIMEOUT_S)
    while (call := calls.get()) is not None:
        function, arguments = call
        try:
            results.put((function(rank, 2, *arguments), None))
        except BaseException:
            results.put((None, traceback.format_exc()))
    dist.destroy_process_group()


class TwoRanks:
    """Two ranks that run functions.

    A call with a module-level function of a test file runs `function(rank, 2, *arguments)` on both
    ranks and returns their results. Arguments and results must be plain values: a tensor's shared
    memory is lost when its process ends.
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
        for calls, _ in self._pipes:
            calls.put((function, arguments))
        outcomes = [results.get(timeout=TIMEOUT_S) for _, results in self._pipes]
        for rank, (_, failure) in enumerate(outcomes):
            assert failure is None, f"rank {rank}: {failure}"
        return [result for result, _ in outcomes]

    def close(self):
        for calls, _ in self._pipes:
            calls.put(None)
        for process in self._processes:
            process.join(timeout=20)
            if process.is_alive():
                process.kill()
