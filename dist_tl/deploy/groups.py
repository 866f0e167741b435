"""Which pods a job needs: one group a role, sized by what the job says. Pure.

A role is a Ray resource of the same name: only its pods have it, and each of its actors asks for
a little of it, so that no actor lands on a pod that was bought for another.
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
        name: the role, and the Ray resource.
        min_pods: kept while the job runs.
        max_pods: at most, when the role has more to do.
        cpus: whole CPUs of a pod, since Ray counts no others.
        gpus: whole GPUs of a pod.
        options: where the pods go and what else they are given.
    """

    name: Role
    min_pods: int
    max_pods: int
    cpus: int
    gpus: int
    options: GroupOptions


def worker_groups(job: JobConfig, options: KubeOptions) -> list[WorkerGroup]:
    """The groups of a job, the one with most of its work first.

    Raises:
        ConfigError: the job says nothing that a group could be sized by.
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
    if getattr(job, "generators", None) is not None:
        groups.append(_generators(job.generators, options.generators))
    return groups


def _trainers(job: Any, options: GroupOptions) -> WorkerGroup:
    each = options.workers_per_pod
    # Trials work beside the trainers; without a CPU of their own they would wait for the end.
    trials = getattr(job, "trials", None)
    spare_cpus, spare_gpus = (trials.cpus, trials.gpus) if trials is not None else (0.0, 0.0)
    trainers = job.trainers
    pods = math.ceil(trainers.workers / each)
    held = min(each, trainers.workers)
    cpus = math.ceil(held * trainers.cpus + spare_cpus)
    gpus = math.ceil(held * trainers.gpus + spare_gpus)
    return WorkerGroup("trainers", pods, pods, cpus, gpus, options)


def _tasks(job: Any, options: GroupOptions) -> WorkerGroup:
    """One group for jobs of independent tasks."""
    trials = job.trials
    return _shared(job, "trainers", options, trials.cpus, trials.cpus, trials.gpus)


def _experts(job: Any, options: GroupOptions) -> WorkerGroup:
    """One group for experts and routers: how many experts a hub has is not in the job."""
    experts = job.experts
    largest = max(experts.cpus, experts.router_cpus)
    return _shared(job, "experts", options, largest, experts.cpus, experts.gpus)


def _shared(
    job: Any, role: Role, options: GroupOptions, largest: float, cpus_each: float, gpus_each: float
) -> WorkerGroup:
    """Pods that together have at least the CPUs of the session, and each room for the largest."""
    total, at_least = job.session.num_cpus, math.ceil(largest)
    pods = max(1, math.ceil(total / max(options.cpus_per_pod, at_least)))
    cpus = max(at_least, math.ceil(total / pods))
    gpus = math.ceil(gpus_each * math.floor(cpus / cpus_each))
    return WorkerGroup(role, pods, pods, cpus, gpus, options)


def _generators(pool: Any, options: GroupOptions) -> WorkerGroup:
    each = options.workers_per_pod
    return WorkerGroup(
        name="generators",
        min_pods=math.ceil(pool.min / each),
        max_pods=math.ceil(pool.max / each),
        cpus=math.ceil(each * pool.cpus),
        gpus=math.ceil(each * pool.gpus),
        options=options,
    )
