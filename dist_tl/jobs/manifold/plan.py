"""Plans a manifold job: its tasks, from its file alone."""

from dist_tl.cluster.config import Task
from dist_tl.jobs.manifold.sources import MomentsInputs, Setting, SourceInputs
from dist_tl.jobs.manifold.spec import Cell, ManifoldJob
from dist_tl.jobs.manifold.tasks import BaselineInputs, CellInputs, Readouts
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.methods.hidden_manifold.gaussian_model import CHUNK
from dist_tl.methods.hidden_manifold.sampling import Knobs
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore


def plan(job: ManifoldJob, store: ObjectStore) -> "ManifoldPlan":
    """The tasks of a job."""
    return ManifoldPlan(job)


class ManifoldPlan:
    """All tasks of a job, from its file alone."""

    def __init__(self, job: ManifoldJob) -> None:
        self.job = job

    def table(self) -> PlanTable:
        """The tasks by phase."""
        job = self.job
        points = f"{len(job.samples) * len(job.lambdas)} points, {job.draws} draws each"
        source = f"{job.source_samples} samples, {job.hidden} hidden units"
        rows = (
            TaskRow(phase="sources", tasks=len(self.sources()), work=source),
            TaskRow(
                phase="moments",
                tasks=len(self.moments()),
                work=f"{job.moment_samples} samples a cell",
            ),
            TaskRow(phase="baselines", tasks=len(self.baselines()), work=points),
            TaskRow(phase="cells", tasks=len(self.cells()), work=points),
        )
        return plan_table(job, tasks=rows)

    def source_keys(self) -> list[tuple[int, int]]:
        """Instance and latent size of every source."""
        sizes = sorted({cell.model.source_latent for cell in self.job.cells()})
        return [(i, size) for i in range(self.job.instances) for size in sizes]

    def baseline_keys(self) -> list[tuple[int, int]]:
        """Instance and latent size of every target law."""
        sizes = sorted({cell.model.target_latent for cell in self.job.cells()})
        return [(i, size) for i in range(self.job.instances) for size in sizes]

    def cell_keys(self) -> list[tuple[int, str]]:
        """Instance and cell name of every cell task."""
        return [(i, cell.name) for i in range(self.job.instances) for cell in self.job.cells()]

    def sources(self) -> list[Task[SourceInputs]]:
        """One training for each source."""
        return [self._source(instance, size) for instance, size in self.source_keys()]

    def moments(self) -> list[Task[MomentsInputs]]:
        """The Monte Carlo sums of every cell, shared out in equal ranges of chunks."""
        return [
            task
            for instance in range(self.job.instances)
            for cell in self.job.cells()
            for task in self._moments(instance, cell)
        ]

    def baselines(self) -> list[Task[BaselineInputs]]:
        """Random features and students from scratch."""
        return [self._baseline(instance, size) for instance, size in self.baseline_keys()]

    def cells(self) -> list[Task[CellInputs]]:
        """Transferred features."""
        return [
            self._cell(instance, cell)
            for instance in range(self.job.instances)
            for cell in self.job.cells()
        ]

    def _setting(self, instance: int, **model: int | Knobs) -> Setting:
        return Setting(
            seed=self.job.seed,
            instance=instance,
            model=self.job.model.model_copy(update=model),
            hidden=self.job.hidden,
            activation=self.job.activation,
        )

    def _source(self, instance: int, size: int) -> Task[SourceInputs]:
        name = _source_name(instance, size)
        # Neither knobs nor target change a source: tasks that differ in them alone are one task.
        setting = self._setting(instance, source_latent=size, target_latent=size, knobs=Knobs())
        inputs = SourceInputs(
            setting=setting,
            samples=self.job.source_samples,
            training=self.job.source_training,
            test_samples=self.job.test_samples,
            weights=_weights_key(instance, size),
        )
        return Task(name, inputs)

    def _moments(self, instance: int, cell: Cell) -> list[Task[MomentsInputs]]:
        sizes = [CHUNK] * (self.job.moment_samples // CHUNK)
        if rest := self.job.moment_samples % CHUNK:
            sizes.append(rest)
        width = -(-len(sizes) // self.job.moment_tasks)
        return [
            Task(
                f"moments-{cell.name}-part{part}-i{instance}",
                MomentsInputs(
                    setting=self._cell_setting(instance, cell),
                    source_weights=_weights_key(instance, cell.model.source_latent),
                    chunks=tuple(sizes[first : first + width]),
                    first_chunk=first,
                    binned=self._has_mixture(cell),
                    sums=_sums_key(instance, cell, part),
                ),
            )
            for part, first in enumerate(range(0, len(sizes), width))
        ]

    def _baseline(self, instance: int, size: int) -> Task[BaselineInputs]:
        inputs = BaselineInputs(
            setting=self._setting(instance, source_latent=size, target_latent=size, knobs=Knobs()),
            readouts=self._readouts(),
            two_layer="two_layer" in self.job.arms,
        )
        return Task(f"baseline-dt{size}-i{instance}", inputs)

    def _cell(self, instance: int, cell: Cell) -> Task[CellInputs]:
        inputs = CellInputs(
            setting=self._cell_setting(instance, cell),
            readouts=self._readouts(),
            source_weights=_weights_key(instance, cell.model.source_latent),
            sums=tuple(task.inputs.sums for task in self._moments(instance, cell)),
            mixture_lambda=self.job.reported_lambda if self._has_mixture(cell) else None,
            fine_tuned="fine_tuned" in self.job.arms,
        )
        return Task(f"cell-{cell.name}-i{instance}", inputs)

    def _cell_setting(self, instance: int, cell: Cell) -> Setting:
        return self._setting(instance, **dict(cell.model))

    def _has_mixture(self, cell: Cell) -> bool:
        return self.job.mixture and cell.is_matched and self.job.activation != "relu"

    def _readouts(self) -> Readouts:
        job = self.job
        return Readouts(
            samples=job.samples,
            lambdas=job.lambdas,
            loss=job.loss,
            draws=job.draws,
            test_samples=job.test_samples,
        )


def _source_name(instance: int, size: int) -> str:
    return f"source-ds{size}-i{instance}"


def _weights_key(instance: int, size: int) -> str:
    return f"{layout.stage_model_prefix(_source_name(instance, size))}/{layout.MODEL_TENSORS}"


def _sums_key(instance: int, cell: Cell, part: int) -> str:
    stage = f"moments-{cell.name}-part{part}-i{instance}"
    return f"{layout.stage_prefix(stage)}/sums.safetensors"
