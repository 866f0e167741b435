"""Sizes of the parts of a cluster, and the inputs of its tasks. Does not import ray."""

from dataclasses import dataclass
from typing import Generic, Self, TypeVar

from pydantic import Field, model_validator

from dist_tl.config import StrictModel

Inputs = TypeVar("Inputs", bound=StrictModel)


class SessionConfig(StrictModel):
    """The private Ray cluster. Sizes are ignored if RAY_ADDRESS names another cluster."""

    num_cpus: int = Field(
        default=8, ge=1, description="Logical CPUs, which actors reserve by `cpus`; not cores."
    )
    roles: bool = Field(
        default=False,
        description="Schedule actors only on nodes that offer the Ray resource of their role: "
        "generators, trainers or experts.",
    )
    object_store_mb: int = Field(
        default=200, ge=80, description="Size of Ray's object store in MB."
    )


class Bounds(StrictModel):
    """Minimum and maximum number of workers of a pool."""

    min: int = Field(ge=0)
    max: int = Field(ge=0)

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"expected min <= max, got {self.min} > {self.max}")
        return self


class GeneratorsConfig(Bounds):
    """The pool of generator workers, sized independently of the trainers."""

    min: int = Field(default=1, ge=0, description="Minimum number of workers during generation.")
    max: int = Field(
        default=2,
        ge=1,
        description="Maximum number of workers, used while readers wait for shards.",
    )
    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for each worker.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each worker.")
    threads: int = Field(
        default=1, ge=1, description="Torch threads per worker; their number affects the pixels."
    )
    window: int = Field(
        default=64, ge=1, description="Maximum number of shards ahead of the slowest reader."
    )
    low_backlog: int = Field(
        default=4, ge=0, description="The pool grows below this number of committed, unread shards."
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="Maximum number of workers lost on one shard, or in a row during start-up.",
    )


class TrainersConfig(StrictModel):
    """The worker group of the trainers."""

    workers: int = Field(
        default=2, ge=1, description="Data-parallel workers; must divide the number of lanes."
    )
    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for each worker.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each worker.")
    threads: int = Field(default=1, ge=1, description="Torch threads per worker.")
    max_failures: int = Field(
        default=3, ge=0, description="Maximum number of restarts of the group."
    )


class ExpertsConfig(Bounds):
    """The expert pool: replicas of every expert, and routers that call them."""

    min: int = Field(default=1, ge=1, description="Minimum number of replicas of each expert.")
    max: int = Field(
        default=1, ge=1, description="Number of replicas of the expert with the highest load."
    )
    routers: int = Field(
        default=1, ge=1, description="Number of routers; each predicts one shard at a time."
    )
    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for each replica.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each replica.")
    router_cpus: float = Field(
        default=1.0, gt=0, description="CPUs that Ray reserves for each router."
    )
    threads: int = Field(default=1, ge=1, description="Torch threads per actor.")
    batch_size: int = Field(
        default=256, ge=1, description="Maximum number of samples per request to an expert."
    )
    max_restarts: int = Field(
        default=3, ge=0, description="Maximum number of restarts of an actor."
    )
    timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Timeout in seconds for the start of an expert, and for its part of a shard.",
    )
    resources: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="Expert name -> additional Ray resources of its replicas, to select nodes.",
    )


class TrialsConfig(StrictModel):
    """Resources of trials and tasks."""

    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for each trial.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each trial.")
    max_retries: int = Field(
        default=3, ge=0, description="Maximum number of retries of a trial whose worker died."
    )


@dataclass(frozen=True)
class Task(Generic[Inputs]):
    """One task; its name is a stage name of the run."""

    name: str
    inputs: Inputs
