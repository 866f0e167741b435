"""Trials: independent training stages with one worker each, in parallel on the cluster."""

from collections.abc import Callable, Sequence

import ray
import torch

from dist_tl.cluster.config import TrialsConfig
from dist_tl.cluster.outcomes import collect
from dist_tl.cluster.roles import actor_options
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.engine import join_group
from dist_tl.train.spec import StageResult, StageSpec
from dist_tl.train.stage import run_stage


class Trials:
    """Starts trials as Ray tasks; :meth:`results` collects them."""

    def __init__(
        self, config: TrialsConfig, store_url: str, *, roles: bool = False, attempt: int = 0
    ) -> None:
        options = actor_options("trainers", enabled=roles, cpus=config.cpus, gpus=config.gpus)
        remote = ray.remote(_run_alone).options(**options, max_retries=config.max_retries)
        self._start = lambda specs: remote.remote(specs, store_url, attempt, config.gpus > 0)

    def start(self, specs: Sequence[StageSpec]) -> ray.ObjectRef:
        """Starts stages that one worker runs in sequence; returns their object ref."""
        return self._start(list(specs))

    def results(
        self, ref: ray.ObjectRef, *, on_poll: Callable[[], None] = lambda: None
    ) -> list[StageResult]:
        """Waits for the results of `start`, in the order of the specifications.

        Raises:
            DistTLError: the named error that a trial raised.
            WorkerError: the worker of a trial died more often than it may be retried.
        """
        while not ray.wait([ref], timeout=0.2)[0]:
            on_poll()
        return collect(ref, "a trial")


def _run_alone(
    specs: list[StageSpec], store_url: str, number: int, use_gpu: bool
) -> list[StageResult]:
    if not use_gpu:
        torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True
    join_group(0, 1)
    store = ObjectStore(store_url)
    attempt = Attempt(store, number)
    return [run_stage(spec, store, rank=0, world_size=1, attempt=attempt) for spec in specs]
