"""The trainers: one Ray Train worker group that takes training stages from a mailbox.

Ray Train starts the workers, joins them into a process group, and restarts all of them when one is
lost. The stage then resumes bit for bit from its last checkpoint.

Results of actor methods are cast: Ray's stub does not know their types.
"""

import os
import time
from collections.abc import Callable
from typing import Any, cast

import ray
import ray.train
import torch
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.train.torch import TorchConfig, TorchTrainer

from dist_tl.cluster.config import TrainersConfig
from dist_tl.cluster.mailbox import QueuedStage, Snapshot
from dist_tl.cluster.metrics import RestartMetrics, TrainerMetrics
from dist_tl.cluster.roles import on_driver_node, role_resources
from dist_tl.errors import DistTLError, WorkerError
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.spec import StageResult, StageSpec
from dist_tl.train.stage import run_stage

POLL_S = 0.1
SHUTDOWN_S = 10.0
SCRATCH = "scratch"  # folder of Ray Train's own files


class TrainerGroup:
    """Context manager of the worker group, which starts in the background on entry.

    Args:
        attempt: the attempt that the group belongs to.
        roles: whether the cluster's nodes have roles.
    """

    def __init__(
        self,
        config: TrainersConfig,
        attempt: Attempt,
        mailbox: ActorHandle,
        *,
        roles: bool = False,
    ) -> None:
        self._mailbox, self._store = mailbox, attempt.store
        settings = {
            "mailbox": mailbox,
            "store_url": attempt.store.url,
            "attempt": attempt.number,
            "threads": config.threads,
            "use_gpu": config.gpus > 0,
        }
        scratch = attempt.store.child(SCRATCH).for_arrow()
        self._trainer = TorchTrainer(
            _work,
            train_loop_config=settings,
            torch_config=TorchConfig(backend="nccl" if config.gpus else "gloo", timeout_s=120),
            scaling_config=ray.train.ScalingConfig(
                num_workers=config.workers,
                use_gpu=config.gpus > 0,
                resources_per_worker=_resources(config, roles),
            ),
            run_config=ray.train.RunConfig(
                name="trainers",
                # A location that every node can read: Ray Train checks for its own marker there.
                storage_path=scratch.path,
                storage_filesystem=scratch.filesystem,
                failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            ),
        )

    def __enter__(self) -> "TrainerGroup":
        # `fit` blocks as long as the group lives. As a task instead of a thread, it stops together
        # with the job's other processes when this driver shuts down Ray.
        self._fitting = _fit.options(**on_driver_node()).remote(self._trainer)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error or Ctrl-C do not wait for the workers: everything needed is committed.
        if kind is None:
            ray.get(self._mailbox.close.remote())
            ray.wait([self._fitting], timeout=SHUTDOWN_S)
            self._store.delete_all(SCRATCH + "/")

    def post(self, spec: StageSpec) -> int:
        """Queues a stage; returns its index for `wait`."""
        return cast(int, ray.get(self._mailbox.post.remote(spec.model_dump_json())))

    def wait(
        self, index: int, *, on_poll: Callable[[Snapshot], None] = lambda _: None
    ) -> StageResult:
        """Waits until the result of a queued stage is stored, and returns it.

        Raises:
            DistTLError: the named error that a worker raised.
            WorkerError: the group died more often than it may be restarted.
        """
        while True:
            snapshot = self._snapshot(index)
            on_poll(snapshot)
            if snapshot.result is not None:
                return StageResult.model_validate_json(snapshot.result)
            if snapshot.error is not None:
                raise snapshot.error
            if ray.wait([self._fitting], timeout=POLL_S)[0]:
                raise WorkerError(
                    "the trainers failed; start the same job again to resume from the last "
                    f"checkpoint. Reason from Ray: {_reason(self._fitting)}"
                )

    def _snapshot(self, index: int) -> Snapshot:
        try:
            return cast(Snapshot, ray.get(self._mailbox.snapshot.remote(index)))
        except RayError as error:
            raise WorkerError(
                f"the Ray cluster was lost: {error}; start the same job again"
            ) from None


@ray.remote(max_retries=0)
def _fit(trainer: TorchTrainer) -> None:
    trainer.fit()


def _reason(fitting: ray.ObjectRef) -> str:
    try:
        ray.get(fitting)
    except RayError as error:
        return str(getattr(error, "cause", None) or error)
    return "the workers exited"


def _resources(config: TrainersConfig, roles: bool) -> dict[str, float]:
    resources = {"CPU": config.cpus, **role_resources("trainers", enabled=roles)}
    if config.gpus:
        resources["GPU"] = config.gpus
    return resources


def _work(settings: dict[str, Any]) -> None:
    """Main loop of each worker: takes stages from the mailbox and runs them."""
    if not settings["use_gpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(settings["threads"])
    torch.backends.cudnn.deterministic = True
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    mailbox, store = settings["mailbox"], ObjectStore(settings["store_url"])
    attempt = Attempt(store, settings["attempt"])
    metrics = TrainerMetrics(store.url) if rank == 0 else None
    if metrics is not None and cast(int, ray.get(mailbox.count_group_start.remote())) > 1:
        RestartMetrics(store.url, "trainers").count()
    finished: int | None = None
    while (queued := _take(mailbox, finished)) is not None:
        spec = StageSpec.model_validate_json(queued.spec)
        try:
            result = run_stage(
                spec,
                store,
                rank=rank,
                world_size=world_size,
                on_progress=_progress_reporter(mailbox, spec, rank, metrics),
                attempt=attempt,
            )
        except DistTLError as error:
            # A retry would raise it again; the driver ends the job with this error.
            ray.get(mailbox.fail.remote(error))
            raise
        if metrics is not None:
            metrics.finished(
                spec.name, starved_s=result.seconds_starved, saving_s=result.seconds_saving
            )
            ray.get(mailbox.finish.remote(queued.index, result.model_dump_json()))
        finished = queued.index


def _take(mailbox: ActorHandle, finished: int | None) -> QueuedStage | None:
    return cast(QueuedStage | None, ray.get(mailbox.take.remote(finished)))


def _progress_reporter(
    mailbox: ActorHandle, spec: StageSpec, rank: int, metrics: TrainerMetrics | None
) -> Callable[[int, float, int | None], None]:
    sources = [rows for rows in (spec.labelled, spec.unlabelled) if isinstance(rows, ShardPlan)]
    source = sources[0].stage if sources else None

    last: tuple[int, float] | None = None  # a resumed stage first reports a later step

    def report(step: int, loss: float, position: int | None) -> None:
        nonlocal last
        now = time.monotonic()
        if metrics is not None and last is not None and step > last[0]:
            metrics.stepped(spec.name, (now - last[1]) / (step - last[0]))
        last = step, now
        mailbox.report_progress.remote(spec.name, rank, step, loss, source, position)

    return report
