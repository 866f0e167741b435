"""How large the parts of a cluster are, and what its tasks are asked: read without ray."""

from dataclasses import dataclass
from typing import Generic, TypeVar

from pydantic import Field, model_validator

from dist_tl.config import StrictModel

Inputs = TypeVar("Inputs", bound=StrictModel)


class SessionConfig(StrictModel):
    """The private Ray cluster; ignored where RAY_ADDRESS names another."""

    num_cpus: int = Field(
        default=8, ge=1, description="Logical CPUs: what actors share by their `cpus`, not cores."
    )
    roles: bool = Field(
        default=False,
        description="Place actors only on nodes that offer the Ray resource of their role: "
        "generators, trainers or experts.",
    )
    object_store_mb: int = Field(default=200, ge=80, description="Shared memory for Ray's objects.")


class GeneratorsConfig(StrictModel):
    """The pool of generator workers, sized independently of the trainers."""

    min: int = Field(default=1, ge=0, description="Workers kept while there is work.")
    max: int = Field(default=2, ge=1, description="Workers at most, while readers wait for shards.")
    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for each worker.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each worker.")
    threads: int = Field(
        default=1, ge=1, description="Torch threads a worker; part of what fixes pixels."
    )
    window: int = Field(
        default=64, ge=1, description="Shards made ahead of the slowest reader at most."
    )
    low_backlog: int = Field(
        default=4, ge=0, description="Committed, unread shards below which to grow."
    )
    max_restarts: int = Field(
        default=3,
        ge=0,
        description="Workers lost over one shard, or on their way up, before the job fails.",
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "GeneratorsConfig":
        if self.min > self.max:
            raise ValueError(f"expected min <= max, got {self.min} > {self.max}")
        return self


class TrainersConfig(StrictModel):
    """The sharded trainers' worker group."""

    workers: int = Field(
        default=2, ge=1, description="Data-parallel workers; lanes must be divisible."
    )
    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for each worker.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each worker.")
    threads: int = Field(default=1, ge=1, description="Torch threads a worker.")
    max_failures: int = Field(
        default=3, ge=0, description="Restarts of the group before the job fails."
    )


class ExpertsConfig(StrictModel):
    """The expert pool: replicas of every expert, and the routers that ask them."""

    min: int = Field(
        default=1, ge=1, description="Replicas of an expert, however few samples it gets."
    )
    max: int = Field(default=1, ge=1, description="Replicas of the expert that gets most samples.")
    routers: int = Field(default=1, ge=1, description="Shards that are answered at a time.")
    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for each replica.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each replica.")
    router_cpus: float = Field(
        default=1.0, gt=0, description="CPUs that Ray reserves for each router."
    )
    threads: int = Field(default=1, ge=1, description="Torch threads of each.")
    batch_size: int = Field(
        default=256, ge=1, description="Samples that an expert is sent at a time."
    )
    max_restarts: int = Field(
        default=3, ge=0, description="Restarts of an actor before it is lost."
    )
    timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="How long an expert may take to come up, and for a shard, before it is lost.",
    )
    resources: dict[str, dict[str, float]] = Field(
        default_factory=dict,
        description="Expert -> further Ray resources of its replicas, to choose their nodes.",
    )

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> "ExpertsConfig":
        if self.min > self.max:
            raise ValueError(f"expected min <= max, got {self.min} > {self.max}")
        return self


class TrialsConfig(StrictModel):
    """How trials share the cluster."""

    cpus: float = Field(default=1.0, gt=0, description="CPUs that Ray reserves for each trial.")
    gpus: float = Field(default=0.0, ge=0, description="GPUs that Ray reserves for each trial.")
    max_retries: int = Field(
        default=3, ge=0, description="Fresh starts of a trial whose worker died."
    )


@dataclass(frozen=True)
class Task(Generic[Inputs]):
    """One piece of work; its name is that of a stage of the run."""

    name: str
    inputs: Inputs
