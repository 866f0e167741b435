"""Prometheus metrics of a running job. Ray exports them on every node with the prefix "ray_".

The dashboard in k8s/grafana plots every metric of this module.
"""

from typing import Literal

from ray.util.metrics import Counter, Gauge

from dist_tl.cluster.roles import Role


class RestartMetrics:
    """Restarts of a role's workers."""

    def __init__(self, run: str, role: Role | Literal["routers"]) -> None:
        self._tags = {"run": run, "role": role}
        self._restarts = Counter(
            "dist_tl_restarts_total", "Restarted workers, or groups of trainers.", ("run", "role")
        )

    def count(self) -> None:
        """Counts one restart."""
        self._restarts.inc(1, tags=self._tags)


class GeneratorMetrics:
    """Metrics of the generator pool, in the driver."""

    def __init__(self, run: str) -> None:
        keys = ("run", "stage")
        self._run = run
        self._shards = Counter(
            "dist_tl_shards_committed_total", "Shards committed since the job started.", keys
        )
        self._samples = Counter(
            "dist_tl_samples_total", "Samples committed since the job started.", keys
        )
        self._backlog = Gauge(
            "dist_tl_backlog_shards", "Committed shards that no reader has read yet.", keys
        )
        self._workers = Gauge("dist_tl_generator_workers", "Running generator workers.", ("run",))

    def committed(self, stage: str, samples: int) -> None:
        """Counts a committed shard."""
        tags = {"run": self._run, "stage": stage}
        self._shards.inc(1, tags=tags)
        self._samples.inc(samples, tags=tags)

    def backlog(self, stage: str, shards: int) -> None:
        """Sets the number of committed, unread shards of a stage."""
        self._backlog.set(shards, tags={"run": self._run, "stage": stage})

    def workers(self, count: int) -> None:
        """Sets the size of the pool."""
        self._workers.set(count, tags={"run": self._run})


class TrainerMetrics:
    """Metrics of the trainers, on rank 0."""

    def __init__(self, run: str) -> None:
        keys = ("run", "stage")
        self._run = run
        self._step = Gauge("dist_tl_step_seconds", "Seconds per optimizer step.", keys)
        self._starved = Gauge("dist_tl_starved_seconds", "Seconds a stage waited for shards.", keys)
        self._saving = Gauge(
            "dist_tl_save_blocked_seconds", "Seconds a stage was blocked by checkpoints.", keys
        )

    def stepped(self, stage: str, seconds: float) -> None:
        """Sets the mean duration of the latest steps."""
        self._step.set(seconds, tags={"run": self._run, "stage": stage})

    def finished(self, stage: str, *, starved_s: float, saving_s: float) -> None:
        """Sets the seconds that a finished stage was starved or blocked."""
        tags = {"run": self._run, "stage": stage}
        self._starved.set(starved_s, tags=tags)
        self._saving.set(saving_s, tags=tags)
