"""What a running job tells Prometheus, by way of Ray: exported by every node, prefixed "ray_".

Driver and workers use them alike. Names and meanings stand here once; the dashboard in
k8s/grafana draws them.
"""

from typing import Literal

from ray.util.metrics import Counter, Gauge

from dist_tl.cluster.roles import Role


class RestartMetrics:
    """Told by whoever starts a role's workers anew."""

    def __init__(self, run: str, role: Role | Literal["routers"]) -> None:
        self._tags = {"run": run, "role": role}
        self._restarts = Counter(
            "dist_tl_restarts_total", "Workers, or groups of trainers, made anew.", ("run", "role")
        )

    def count(self) -> None:
        """One more."""
        self._restarts.inc(1, tags=self._tags)


class GeneratorMetrics:
    """Told by the driver's generator pool."""

    def __init__(self, run: str) -> None:
        keys = ("run", "stage")
        self._run = run
        self._shards = Counter(
            "dist_tl_shards_committed_total", "Shards committed since the job started.", keys
        )
        self._samples = Counter("dist_tl_samples_total", "Samples in those shards.", keys)
        self._backlog = Gauge(
            "dist_tl_backlog_shards", "Committed shards that no reader has taken yet.", keys
        )
        self._workers = Gauge("dist_tl_generator_workers", "Generator workers alive.", ("run",))

    def committed(self, stage: str, samples: int) -> None:
        """Count a shard."""
        tags = {"run": self._run, "stage": stage}
        self._shards.inc(1, tags=tags)
        self._samples.inc(samples, tags=tags)

    def backlog(self, stage: str, shards: int) -> None:
        """Shards of a stage that wait for readers."""
        self._backlog.set(shards, tags={"run": self._run, "stage": stage})

    def workers(self, count: int) -> None:
        """Size of the pool."""
        self._workers.set(count, tags={"run": self._run})


class TrainerMetrics:
    """Told by rank 0 of the trainers."""

    def __init__(self, run: str) -> None:
        keys = ("run", "stage")
        self._run = run
        self._step = Gauge("dist_tl_step_seconds", "Seconds an optimizer step takes.", keys)
        self._starved = Gauge("dist_tl_starved_seconds", "Seconds a stage waited for shards.", keys)
        self._saving = Gauge(
            "dist_tl_save_blocked_seconds", "Seconds a stage was blocked by checkpoints.", keys
        )

    def stepped(self, stage: str, seconds: float) -> None:
        """Mean duration of the latest steps."""
        self._step.set(seconds, tags={"run": self._run, "stage": stage})

    def finished(self, stage: str, *, starved_s: float, saving_s: float) -> None:
        """What a whole stage lost."""
        tags = {"run": self._run, "stage": stage}
        self._starved.set(starved_s, tags=tags)
        self._saving.set(saving_s, tags=tags)
