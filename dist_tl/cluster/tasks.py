"""Independent Ray tasks, each with a stored output.

A task is a module-level function of its inputs and the store. The output is written last, with the
fingerprint of the inputs: a finished task is read instead of run again, and a task whose worker
died is retried with the same result.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray
import torch
from pydantic import Field

from dist_tl.cluster.config import Task, TrialsConfig
from dist_tl.cluster.outcomes import collect
from dist_tl.cluster.roles import actor_options
from dist_tl.config import StrictModel, fingerprint
from dist_tl.errors import CheckpointMismatchError
from dist_tl.storage import layout
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import read_record, write_record

Inputs = TypeVar("Inputs", bound=StrictModel)
Output = TypeVar("Output", bound=StrictModel)
OnDone = Callable[[int, int, str], None]


def run_tasks(
    work: Callable[[Inputs, ObjectStore], Output],
    tasks: Sequence[Task[Inputs]],
    output: type[Output],
    store: ObjectStore,
    *,
    config: TrialsConfig,
    roles: bool = False,
    attempt: int = 0,
    on_poll: Callable[[], None] = lambda: None,
    on_done: OnDone = lambda done, total, name: None,
) -> list[Output]:
    """Runs every task without a stored output; returns all outputs in the order of `tasks`.

    At most four tasks per CPU are submitted to Ray at a time, so large sweeps start at once.

    Args:
        work: a module-level function; its named errors reach the caller.
        output: the class of the outputs.
        attempt: number of the attempt; a superseded attempt stores nothing. 0 disables the check.
        roles: whether the cluster's nodes have roles; tasks run on those of trainers.
        on_done: called with the number of finished tasks, of all tasks, and the name of the latest.

    Raises:
        DistTLError: the named error that a task raised.
        CheckpointMismatchError: a stored output has other inputs.
        WorkerError: the worker of a task died more often than it may be retried.
    """
    stored = {task.name: read_output(store, task, output) for task in tasks}
    outputs = {name: value for name, value in stored.items() if value is not None}
    missing = iter([task for task in tasks if task.name not in outputs])
    done = len(outputs)
    options = actor_options("trainers", enabled=roles, cpus=config.cpus, gpus=config.gpus)
    remote = ray.remote(_run_one).options(**options, max_retries=config.max_retries)

    def start(task: Task[Inputs]) -> ray.ObjectRef:
        return remote.remote(work, task, store.url, attempt, config.gpus > 0)

    limit = max(1, int(4 * ray.cluster_resources().get("CPU", 1) / config.cpus))
    running = {start(task): task for task in _take(missing, limit)}
    while running:
        ready, _ = ray.wait(list(running), timeout=0.2)
        on_poll()
        for ref in ready:
            task = running.pop(ref)
            outputs[task.name] = output.model_validate_json(collect(ref, task.name))
            done += 1
            on_done(done, len(tasks), task.name)
            for next_task in _take(missing, 1):
                running[start(next_task)] = next_task
    return [outputs[task.name] for task in tasks]


def read_output(store: ObjectStore, task: Task[Inputs], output: type[Output]) -> Output | None:
    """Returns the output of a finished task, or None if it has not run.

    Raises:
        CheckpointMismatchError: the stored output has other inputs.
        DamagedError: the stored output is not the one that was written.
    """
    remedy = "start the same job again, which runs the task again"
    stored = read_record(store, layout.result_key(task.name), StoredOutput, remedy=remedy)
    if stored is None:
        return None
    if stored.inputs != _fingerprint(task):
        raise CheckpointMismatchError(
            f"{task.name} ran with other settings; use another run name, or delete that run"
        )
    return output.model_validate_json(stored.output)


class StoredOutput(StrictModel):
    """The content of a task's result.json."""

    inputs: str = Field(description="Fingerprint of the inputs.")
    output: str = Field(description="The output as JSON.")


def _fingerprint(task: Task[Inputs]) -> str:
    return fingerprint(task.inputs.model_dump(mode="json"))


def _take(tasks: Iterator[Task[Inputs]], count: int) -> list[Task[Inputs]]:
    return [task for _, task in zip(range(count), tasks, strict=False)]


def _run_one(
    work: Callable[[Inputs, ObjectStore], Output],
    task: Task[Inputs],
    store_url: str,
    attempt: int,
    gpu: bool,
) -> str:
    if not gpu:
        # One thread per task: the number of threads changes rounding, and tasks share the cores.
        torch.set_num_threads(1)
    store = ObjectStore(store_url)
    output = work(task.inputs, store).model_dump_json()
    Attempt(store, attempt).check()
    stored = StoredOutput(inputs=_fingerprint(task), output=output)
    write_record(store, layout.result_key(task.name), stored)
    return output
