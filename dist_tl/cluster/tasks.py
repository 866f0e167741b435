"""Independent pieces of work as Ray tasks, each with a result marker in the store.

A task is a module-level function of one configuration and the store. Its result is written last
and carries the fingerprint of what was asked: a task that was done is read, not run again, and one
whose worker died is run again with the same outcome.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import ray
import torch

from dist_tl.cluster.config import Task, TrialsConfig
from dist_tl.cluster.outcomes import collect
from dist_tl.cluster.roles import actor_options
from dist_tl.config import StrictModel, fingerprint
from dist_tl.errors import CheckpointMismatchError
from dist_tl.storage import layout
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore

Inputs = TypeVar("Inputs", bound=StrictModel)
Output = TypeVar("Output", bound=StrictModel)
OnDone = Callable[[int, int, str], None]


def run_tasks(
    work: Callable[[Inputs, ObjectStore], Output],
    tasks: Sequence[Task[Inputs]],
    answer: type[Output],
    store: ObjectStore,
    *,
    config: TrialsConfig,
    roles: bool = False,
    attempt: int = 0,
    on_poll: Callable[[], None] = lambda: None,
    on_done: OnDone = lambda done, total, name: None,
) -> list[Output]:
    """Run every task that has no result yet; the answers in the order of `tasks`.

    At most four tasks per CPU are with Ray at a time, so that a sweep of any length starts at once.

    Args:
        work: a module-level function; a task's own named errors reach the caller.
        attempt: the start of the run; no answer is stored after a later one. 0 does not look.
        roles: whether the cluster's nodes have roles; tasks run on those of trainers.
        on_done: told tasks done, tasks in all, and the name of the last.

    Raises:
        DistTLError: the named error that a task met.
        CheckpointMismatchError: a stored result answers another question.
        WorkerError: a worker died more often than a task may start again.
    """
    found = {task.name: read_output(store, task, answer) for task in tasks}
    missing = iter([task for task in tasks if found[task.name] is None])
    done = sum(value is not None for value in found.values())
    options = actor_options("trainers", enabled=roles, cpus=config.cpus, gpus=config.gpus)
    remote = ray.remote(_run_one).options(**options, max_retries=config.max_retries)

    def start(task: Task[Inputs]) -> ray.ObjectRef:
        return remote.remote(work, task, store.url, attempt, config.gpus > 0)

    room = max(1, int(4 * ray.cluster_resources().get("CPU", 1) / config.cpus))
    running = {start(task): task for task in _take(missing, room)}
    while running:
        ready, _ = ray.wait(list(running), timeout=0.2)
        on_poll()
        for ticket in ready:
            task = running.pop(ticket)
            found[task.name] = answer.model_validate_json(collect(ticket, task.name))
            done += 1
            on_done(done, len(tasks), task.name)
            for following in _take(missing, 1):
                running[start(following)] = following
    return [found[task.name] for task in tasks]


def read_output(store: ObjectStore, task: Task[Inputs], answer: type[Output]) -> Output | None:
    """A task's stored answer; None where it is not done.

    Raises:
        CheckpointMismatchError: it was made for other settings.
    """
    data = store.read_or_none(layout.result_key(task.name))
    if data is None:
        return None
    stored = StoredOutput.model_validate_json(data)
    if stored.inputs != _fingerprint(task):
        raise CheckpointMismatchError(
            f"{task.name} was done with other settings; use another run name, or delete that run"
        )
    return answer.model_validate_json(stored.answer)


class StoredOutput(StrictModel):
    """result.json of a task."""

    inputs: str
    answer: str


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
        # One thread a task: more would change the rounding, and only wait for each other.
        torch.set_num_threads(1)
    store = ObjectStore(store_url)
    answer = work(task.inputs, store).model_dump_json()
    Attempt(store, attempt).check()
    stored = StoredOutput(inputs=_fingerprint(task), answer=answer)
    store.write(layout.result_key(task.name), stored.model_dump_json().encode())
    return answer
