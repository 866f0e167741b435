"""Resources that a job requests from Kubernetes: one row per pod group. Pure.

Not covered: the submitter pod, which is small.
"""

from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.deploy.groups import WorkerGroup, worker_groups
from dist_tl.deploy.options import KubeOptions
from dist_tl.jobs.spec import JobConfig


class KubeRow(StrictModel):
    """One pod group; resources are per pod."""

    group: str = Field(description="head, or the role of the workers.")
    pods_min: int = Field(description="Minimum number of pods while the job runs.")
    pods_max: int = Field(description="Maximum number of pods.")
    cpus: float = Field(description="CPUs per pod.")
    gpus: int = Field(description="GPUs per pod.")
    memory_gb: float = Field(description="Memory per pod, GiB.")
    disk_gb: float = Field(description="Ephemeral storage per pod, GiB.")
    spot: bool = Field(description="Whether the pods tolerate spot nodes.")


def kube_rows(job: JobConfig, options: KubeOptions) -> list[KubeRow]:
    """Returns one row for the head, then one per worker group.

    Raises:
        ConfigError: the job has no trainers, trials or experts to size a group by.
    """
    return [_head(options), *(_row(group) for group in worker_groups(job, options))]


def _head(options: KubeOptions) -> KubeRow:
    head = options.head
    return KubeRow(
        group="head",
        pods_min=1,
        pods_max=1,
        cpus=head.cpus,
        gpus=0,
        memory_gb=head.memory_gb,
        disk_gb=head.ephemeral_gb,
        spot=False,
    )


def _row(group: WorkerGroup) -> KubeRow:
    return KubeRow(
        group=group.name,
        pods_min=group.min_pods,
        pods_max=group.max_pods,
        cpus=group.cpus,
        gpus=group.gpus,
        memory_gb=group.options.memory_gb,
        disk_gb=group.options.ephemeral_gb,
        spot=group.options.spot,
    )
