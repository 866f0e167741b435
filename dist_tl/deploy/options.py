"""Options of one Kubernetes cluster: image, accounts, nodes, limits. Does not import ray.

Not covered: the job file, and secrets, which are only referenced by name here.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_tl.config import StrictModel, read_yaml, validate
from dist_tl.errors import ConfigError
from dist_tl.telemetry import redact

DNS_LABEL = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$"
# The path of a token file is not a secret: AWS_WEB_IDENTITY_TOKEN_FILE.
SECRET_NAME = re.compile(
    r"(?i)(secret|token|passw(or)?d|access_?key|api_?key|credential)(?!.*_(file|path)$)"
)
# Taints of spot nodes by cloud; tolerating the taint of another cloud does no harm.
_SPOT_TAINTS = {
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def installed_ray() -> str:
    """Returns the version of Ray in this environment.

    Raises:
        ConfigError: Ray is not installed.
    """
    try:
        return version("ray")
    except PackageNotFoundError:
        raise ConfigError("Ray is not installed; install it or set ray_version") from None


class Toleration(StrictModel):
    """A node taint that pods tolerate."""

    key: str = Field(min_length=1, description="Taint key.")
    operator: Literal["Exists", "Equal"] = Field(
        default="Equal", description="Equal matches one value of the taint, Exists any value."
    )
    value: str | None = Field(default=None, description="Taint value; only with operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] = Field(
        default="NoSchedule", description="Taint effect."
    )

    @model_validator(mode="after")
    def _value_matches_operator(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("expected a value with operator Equal and none with Exists")
        return self


class PlacementOptions(StrictModel):
    """Node placement of pods."""

    node_selector: dict[str, str] = Field(
        default_factory=dict, description="Labels that a node must have."
    )
    tolerations: tuple[Toleration, ...] = Field(
        default=(), description="Node taints that the pods tolerate."
    )
    priority_class: str | None = Field(
        default=None,
        pattern=DNS_NAME,
        description="Name of a PriorityClass; default: the cluster's default.",
    )


class HeadOptions(PlacementOptions):
    """The head pod: Ray's system processes and the driver of the job; it runs no actors."""

    cpus: float = Field(default=2, gt=0, le=1024, description="CPUs of the head.")
    memory_gb: float = Field(default=8, ge=2, le=16384, description="Memory of the head, GiB.")
    ephemeral_gb: float = Field(
        default=20, ge=1, le=65536, description="Ephemeral storage for logs and results, GiB."
    )
    shm_gb: float = Field(
        default=1, gt=0, le=4096, description="Size of /dev/shm, GiB; part of memory_gb."
    )

    @model_validator(mode="after")
    def _shared_memory_fits(self) -> Self:
        _check_shared_memory(self)
        return self


class GroupOptions(PlacementOptions):
    """The worker pods of one role."""

    workers_per_pod: int = Field(default=1, ge=1, le=64, description="Actors of the role per pod.")
    cpus_per_pod: int = Field(
        default=4,
        ge=1,
        le=1024,
        description="CPUs per pod of jobs without trainers, whose pods are not sized by workers.",
    )
    memory_gb: float = Field(default=8, ge=1, le=16384, description="Memory per pod, GiB.")
    ephemeral_gb: float = Field(
        default=20,
        ge=1,
        le=65536,
        description="Ephemeral storage for caches, logs and temporary files, GiB.",
    )
    shm_gb: float = Field(
        default=1, gt=0, le=4096, description="Size of /dev/shm, GiB; part of memory_gb."
    )
    gpu_resource: str = Field(
        default="nvidia.com/gpu",
        pattern=r"^[a-z0-9.-]+/[a-z0-9.-]*gpu$",
        description="Extended resource name of the GPUs; Ray requires a name that ends in gpu.",
    )
    spot: bool = Field(default=False, description="Tolerate the taints of spot nodes.")
    grace_s: int = Field(
        default=60,
        ge=40,
        le=7200,
        description="Termination grace period of a pod, seconds; for generators longer than one "
        "shard takes.",
    )

    @model_validator(mode="after")
    def _shared_memory_fits(self) -> Self:
        _check_shared_memory(self)
        return self

    def all_tolerations(self) -> tuple[Toleration, ...]:
        """Returns the tolerations, including those of spot nodes if `spot` is set."""
        if not self.spot:
            return self.tolerations
        spot = (Toleration(key=key, value=value) for key, value in _SPOT_TAINTS.items())
        return (*self.tolerations, *(t for t in spot if t not in self.tolerations))


def _check_shared_memory(options: HeadOptions | GroupOptions) -> None:
    if options.shm_gb > options.memory_gb / 2:
        raise ValueError(
            f"shm_gb is part of the memory: expected at most half of memory_gb "
            f"({options.memory_gb:g}), got {options.shm_gb:g}"
        )


class KubeOptions(StrictModel):
    """Settings of all jobs on one Kubernetes cluster."""

    namespace: str | None = Field(
        default=None,
        pattern=DNS_LABEL,
        description="Namespace of the jobs; default: that of the current kubectl context.",
    )
    image: str = Field(
        min_length=1,
        description="Container image with dist_tl, built from k8s/Dockerfile; preferably by "
        "digest.",
    )
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field(
        default="IfNotPresent", description="Pull policy of the image."
    )
    image_pull_secrets: tuple[str, ...] = Field(
        default=(), description="Names of the Secrets for the image registry."
    )
    ray_version: str = Field(
        default_factory=installed_ray,
        pattern=r"^\d+\.\d+\.\d+",
        description="Ray version of the image; default: the installed one.",
    )
    head_account: str | None = Field(
        default="dist-tl-head",
        pattern=DNS_NAME,
        description="ServiceAccount of the head; null: KubeRay creates one.",
    )
    worker_account: str | None = Field(
        default="dist-tl-worker",
        pattern=DNS_NAME,
        description="ServiceAccount of the workers; null: the namespace's default account.",
    )
    submitter_account: str | None = Field(
        default="dist-tl-submitter",
        pattern=DNS_NAME,
        description="ServiceAccount of the submitter pod; null: the namespace's default account.",
    )
    credentials: str | None = Field(
        default=None,
        pattern=DNS_NAME,
        description="Name of a Secret whose keys become environment variables of head and "
        "workers, e.g. AWS_ACCESS_KEY_ID; default: workload identity.",
    )
    endpoint_url: str | None = Field(
        default=None,
        pattern=r"^https?://\S+$",
        description="Endpoint of an S3-compatible store other than AWS.",
    )
    env: dict[str, str] = Field(
        default_factory=dict,
        description="Extra environment variables of head and workers, e.g. AWS_REGION. No secrets.",
    )
    pod_labels: dict[str, str] = Field(
        default_factory=dict,
        description="Extra labels of head and workers, e.g. azure.workload.identity/use.",
    )
    queue: str | None = Field(
        default=None, pattern=DNS_NAME, description="Kueue LocalQueue that admits the job."
    )
    suspend: bool = Field(
        default=False, description="Create the job suspended: nothing starts until it is resumed."
    )
    backoff_limit: int = Field(
        default=2,
        ge=0,
        le=100,
        description="Retries of a failed job, each on a new cluster; they resume from the last "
        "checkpoint.",
    )
    ttl_seconds_after_finished: int = Field(
        default=600,
        ge=0,
        description="Seconds that the pods of a finished job are kept, for their logs.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        description="Seconds after which a running job fails; default: no limit.",
    )
    idle_timeout_s: int = Field(
        default=120,
        ge=10,
        le=86400,
        description="Seconds after which an idle pod above the minimum is removed.",
    )
    run_as_user: int = Field(
        default=10001, ge=1, description="User id of the containers, as in the image; never root."
    )
    head: HeadOptions = Field(default_factory=HeadOptions)
    trainers: GroupOptions = Field(default_factory=GroupOptions)
    generators: GroupOptions = Field(default_factory=lambda: GroupOptions(grace_s=300))
    experts: GroupOptions = Field(default_factory=lambda: GroupOptions(grace_s=120))

    @field_validator("env")
    @classmethod
    def _no_secrets(cls, env: dict[str, str]) -> dict[str, str]:
        for key, value in env.items():
            if SECRET_NAME.search(key) or redact(value) != value:
                raise ValueError(
                    f"{key} looks like a secret; store it in a Secret and name it in credentials"
                )
        return env

    @field_validator("endpoint_url")
    @classmethod
    def _no_login(cls, url: str | None) -> str | None:
        if url is not None and "@" in url:
            raise ValueError(
                "the URL contains a login; store it in a Secret and name it in credentials"
            )
        return url


def read_options(path: str | Path) -> KubeOptions:
    """Reads options from a YAML file.

    Raises:
        ConfigError: the file is missing or invalid.
    """
    return validate(KubeOptions, read_yaml(path, name="options file"), source=str(path))
