"""Worker groups of a job: one group per role, sized from the job file. Pure.

Each role is a custom Ray resource of the same name. Only the pods of the role provide it, and each
actor of the role requests a small amount, so no actor is scheduled on a pod of another role.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from dist_tl.deploy.options import GroupOptions, KubeOptions
from dist_tl.errors import ConfigError
from dist_tl.jobs.spec import JobConfig

Role = Literal["trainers", "generators", "experts"]


@dataclass(frozen=True)
class WorkerGroup:
    """The pods of one role.

    Attributes:
        name: the role, and the name of its Ray resource.
        min_pods: minimum number of pods while the job runs.
        max_pods: maximum number of pods the autoscaler may create.
        cpus: CPUs per pod; Ray counts whole CPUs only.
        gpus: GPUs per pod.
        options: node placement and the remaining pod settings.
    """

    name: Role
    min_pods: int
    max_pods: int
    cpus: int
    gpus: int
    options: GroupOptions


def worker_groups(job: JobConfig, options: KubeOptions) -> list[WorkerGroup]:
    """Returns the worker groups of a job, the main one first.

    Raises:
        ConfigError: the job has no trainers, trials or experts to size a group by.
    """
    if hasattr(job, "trainers"):
        groups = [_trainers(job, options.trainers)]
    elif hasattr(job, "trials"):
        groups = [_tasks(job, options.trainers)]
    elif hasattr(job, "experts"):
        groups = [_experts(job, options.experts)]
    else:
        raise ConfigError(
            f"expected a job with trainers, trials or experts, got {type(job).__name__}"
        )
    generators = getattr(job, "generators", None)
    if generators is not None:
        groups.append(_generators(generators, options.generators))
    return groups


def _trainers(job: Any, options: GroupOptions) -> WorkerGroup:
    per_pod = options.workers_per_pod
    # Trials run alongside the trainers; without CPUs of their own they would wait until the end.
    trials = getattr(job, "trials", None)
    spare_cpus, spare_gpus = (trials.cpus, trials.gpus) if trials is not None else (0.0, 0.0)
    trainers = job.trainers
    pods = math.ceil(trainers.workers / per_pod)
    workers = min(per_pod, trainers.workers)
    cpus = math.ceil(workers * trainers.cpus + spare_cpus)
    gpus = math.ceil(workers * trainers.gpus + spare_gpus)
    return WorkerGroup("trainers", pods, pods, cpus, gpus, options)


def _tasks(job: Any, options: GroupOptions) -> WorkerGroup:
    """Returns the single group of a job that consists of independent tasks."""
    trials = job.trials
    return _sized_by_session(job, "trainers", options, trials.cpus, trials.cpus, trials.gpus)


def _experts(job: Any, options: GroupOptions) -> WorkerGroup:
    """Returns one group for experts and routers; the job does not state the number of experts."""
    experts = job.experts
    largest = max(experts.cpus, experts.router_cpus)
    return _sized_by_session(job, "experts", options, largest, experts.cpus, experts.gpus)


def _sized_by_session(
    job: Any, role: Role, options: GroupOptions, largest: float, cpus_each: float, gpus_each: float
) -> WorkerGroup:
    """Returns pods that cover `session.num_cpus` in total and each fit the largest actor."""
    total, at_least = job.session.num_cpus, math.ceil(largest)
    pods = max(1, math.ceil(total / max(options.cpus_per_pod, at_least)))
    cpus = max(at_least, math.ceil(total / pods))
    gpus = math.ceil(gpus_each * math.floor(cpus / cpus_each))
    return WorkerGroup(role, pods, pods, cpus, gpus, options)


def _generators(pool: Any, options: GroupOptions) -> WorkerGroup:
    per_pod = options.workers_per_pod
    return WorkerGroup(
        name="generators",
        min_pods=math.ceil(pool.min / per_pod),
        max_pods=math.ceil(pool.max / per_pod),
        cpus=math.ceil(per_pod * pool.cpus),
        gpus=math.ceil(per_pod * pool.gpus),
        options=options,
    )
