"""What a cluster is asked beside the job: image, accounts, nodes, limits. Read without ray.

Not covered: what the job itself says (its own file) and secrets, which are only named here.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_tl.config import StrictModel, parse_yaml, validate
from dist_tl.errors import ConfigError
from dist_tl.telemetry import redact

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
# The path of a token is none: AWS_WEB_IDENTITY_TOKEN_FILE.
SECRET_NAME = re.compile(
    r"(?i)(secret|token|passw(or)?d|access_?key|api_?key|credential)(?!.*_(file|path)$)"
)
# Each cloud repels ordinary pods from interrupted nodes in its own way; the others' do no harm.
_SPOT_TAINTS = {
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def installed_ray() -> str:
    """The version of Ray in this environment.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        return version("ray")
    except PackageNotFoundError:
        raise ConfigError(
            "expected Ray beside dist_tl, found none; install it or give ray_version"
        ) from None


class Toleration(StrictModel):
    """A taint of nodes that pods accept."""

    key: str = Field(min_length=1, description="Of the taint.")
    operator: Literal["Exists", "Equal"] = Field(default="Equal", description="Exists: any value.")
    value: str | None = Field(default=None, description="Of the taint, with operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        default="NoSchedule", description="Of the taint."
    )

    @model_validator(mode="after")
    def _value_fits_the_operator(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("expected a value with operator Equal and none with Exists")
        return self


class PlaceOptions(StrictModel):
    """Which nodes pods go to."""

    node_selector: dict[str, str] = Field(
        default_factory=dict, description="Labels that a node must have."
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(), description="Taints that the pods accept."
    )
    priority_class: str | None = Field(
        default=None,
        pattern=DNS_NAME,
        description="Name of a PriorityClass; absent: the default one.",
    )


class HeadOptions(PlaceOptions):
    """The head: Ray's own servers and the driver of the job; no actor lands there."""

    cpus: float = Field(default=2, gt=0, le=1024, description="CPUs of the head.")
    memory_gb: float = Field(default=8, ge=2, le=16384, description="Memory of the head, GiB.")
    ephemeral_gb: float = Field(
        default=20, ge=1, le=65536, description="Disk for logs and results, GiB."
    )
    shm_gb: float = Field(default=1, gt=0, le=4096, description="/dev/shm, GiB; counts as memory.")

    @model_validator(mode="after")
    def _shared_memory_is_memory(self) -> Self:
        return _check_shared(self)


class GroupOptions(PlaceOptions):
    """The pods of one role."""

    workers_per_pod: int = Field(
        default=1, ge=1, le=64, description="Actors of the role in one pod."
    )
    cpus_per_pod: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="Of jobs that are made of tasks; the others count workers.",
    )
    memory_gb: float = Field(default=8, ge=1, le=16384, description="Memory of a pod, GiB.")
    ephemeral_gb: float = Field(
        default=20, ge=1, le=65536, description="Disk for caches, logs and temporary files, GiB."
    )
    shm_gb: float = Field(default=1, gt=0, le=4096, description="/dev/shm, GiB; counts as memory.")
    gpu_resource: str = Field(
        default="nvidia.com/gpu",
        pattern=r"^[a-z0-9.-]+/[a-z0-9.-]*gpu$",
        description="What the nodes call their GPUs; Ray looks for a name that ends in gpu.",
    )
    spot: bool = Field(default=False, description="Accept nodes that the cloud may take away.")
    grace_s: int = Field(
        default=60,
        ge=40,
        le=7200,
        description="Seconds from the wish to end a pod to its end; of generators more than a "
        "shard takes.",
    )

    @model_validator(mode="after")
    def _shared_memory_is_memory(self) -> Self:
        return _check_shared(self)

    def accepted(self) -> tuple[Toleration, ...]:
        """Tolerations, with those of spot nodes where they are accepted."""
        if not self.spot:
            return self.tolerations
        spot = (Toleration(key=key, value=value) for key, value in _SPOT_TAINTS.items())
        return (*self.tolerations, *(t for t in spot if t not in self.tolerations))


def _check_shared(group: HeadOptions | GroupOptions) -> Self:
    if group.shm_gb > group.memory_gb / 2:
        raise ValueError(
            f"shm_gb counts as memory: expected at most half of memory_gb "
            f"({group.memory_gb:g}), got {group.shm_gb:g}"
        )
    return group


class KubeOptions(StrictModel):
    """How jobs run on one Kubernetes cluster."""

    namespace: str | None = Field(
        default=None, pattern=DNS_LABEL, description="Absent: that of the current kubectl context."
    )
    image: str = Field(
        min_length=1, description="Holds dist_tl; made from k8s/Dockerfile. Best by digest."
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="When nodes ask the registry."
    )
    image_pull_secrets: tuple[str, ...] = Field(default=(), description="Names of Secrets.")
    ray_version: str = Field(
        default_factory=installed_ray,
        pattern=r"^\d+\.\d+\.\d+",
        description="Of the image; absent: the one installed here.",
    )
    head_account: str | None = Field(
        default="dist-tl-head",
        pattern=DNS_NAME,
        description="ServiceAccount of the head; null: KubeRay makes one.",
    )
    worker_account: str | None = Field(
        default="dist-tl-worker", pattern=DNS_NAME, description="Of workers; null: the default one."
    )
    submitter_account: str | None = Field(
        default="dist-tl-submitter",
        pattern=DNS_NAME,
        description="Of the pod that hands in the job.",
    )
    credentials: str | None = Field(
        default=None,
        pattern=DNS_NAME,
        description="Name of a Secret whose keys become the environment of head and workers, "
        "e.g. AWS_ACCESS_KEY_ID; absent: workload identity.",
    )
    endpoint_url: str | None = Field(
        default=None, pattern=r"^https?://\S+$", description="Of an S3 that is not AWS."
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        description="More environment of head and workers, e.g. AWS_REGION. No secrets.",
    )
    pod_labels: dict[str, str] = Field(
        default_factory=dict,
        description="More labels of head and workers, e.g. azure.workload.identity/use.",
    )
    queue: str | None = Field(
        default=None, pattern=DNS_NAME, description="Kueue's LocalQueue that admits the job."
    )
    suspend: bool = Field(default=False, description="Make the job, start nothing.")
    backoff_limit: int = Field(
        default=2,
        ge=0,
        le=100,
        description="New clusters for a job that failed; it goes on from COMMIT.",
    )
    ttl_seconds_after_finished: int = Field(
        default=600, ge=0, description="How long pods of a finished job stay, for their logs."
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        description="A job that runs longer fails; absent: it may take its time.",
    )
    idle_timeout_s: int = Field(
        default=120,
        ge=10,
        le=86400,
        description="An idle pod above the minimum ends after so long.",
    )
    run_as_user: int = Field(default=10001, ge=1, description="The image's uid; never root.")
    head: HeadOptions = Field(default_factory=HeadOptions)
    trainers: GroupOptions = Field(default_factory=GroupOptions)
    generators: GroupOptions = Field(default_factory=lambda: GroupOptions(grace_s=300))
    experts: GroupOptions = Field(default_factory=lambda: GroupOptions(grace_s=120))

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for key, value in env.items():
            if SECRET_NAME.search(key) or redact(value) != value:
                raise ValueError(f"{key} looks like a secret; put it into a Secret: credentials")
        return env

    @field_validator("endpoint_url")
    @classmethod
    def _no_login(cls, url: str | None) -> str | None:
        if url is not None and "@" in url:
            raise ValueError("the URL carries a login; put it into a Secret: credentials")
        return url


def read_options(path: str | Path) -> KubeOptions:
    """The options that a YAML file gives.

    Raises:
        ConfigError: the file is missing or says something that options cannot say.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the options file {path}: {error.strerror}") from None
    return validate(KubeOptions, parse_yaml(text, source=str(path)), source=str(path))
