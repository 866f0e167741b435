"""What a job asks of a Kubernetes cluster, one row a group of pods. Pure.

Not covered: the pod that hands the job in, which is small.
"""

from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.deploy.groups import WorkerGroup, worker_groups
from dist_tl.deploy.options import KubeOptions
from dist_tl.jobs.spec import JobConfig


class KubeRow(StrictModel):
    """The pods of one group; sizes are those of one pod."""

    group: str = Field(description="head, or the role of the workers.")
    pods_min: int = Field(description="Kept while the job runs.")
    pods_max: int = Field(description="At most.")
    cpus: float = Field(description="CPUs of a pod.")
    gpus: int = Field(description="GPUs of a pod.")
    memory_gb: float = Field(description="Memory of a pod, GiB.")
    disk_gb: float = Field(description="Disk of a pod, GiB.")
    spot: bool = Field(description="Whether nodes are accepted that the cloud may take away.")


def kube_rows(job: JobConfig, options: KubeOptions) -> list[KubeRow]:
    """The head, then the groups of workers.

    Raises:
        ConfigError: the job says nothing that a group could be sized by.
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
