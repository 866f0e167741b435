"""Plans a manifold job: sources, moments of their features, baselines and cells."""

from collections.abc import Sequence
from dataclasses import dataclass

from dist_tl.cluster.config import Task
from dist_tl.config import StrictModel
from dist_tl.jobs.manifold.spec import ManifoldJob
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.methods.hidden_manifold.cells import Cell
from dist_tl.methods.hidden_manifold.gaussian_model import CHUNK
from dist_tl.seeds import derive_seed
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore


def plan(job: ManifoldJob, store: ObjectStore) -> "ManifoldPlan":
    """Returns the tasks of a job."""
    return ManifoldPlan(job)


class CellInputs(StrictModel):
    """Task inputs: one cell of one instance."""

    job: ManifoldJob
    instance: int
    cell: Cell

    @property
    def seed(self) -> int:
        """Seed of everything random in this instance."""
        return derive_seed(self.job.seed, "manifold instance", self.instance)

    @property
    def weights_key(self) -> str:
        """Key of the first layer of the source."""
        stage = source_name(self.instance, self.cell)
        return f"{layout.stage_model_prefix(stage)}/{layout.MODEL_TENSORS}"

    @property
    def sums_keys(self) -> list[str]:
        """Keys of the moment sums of this cell, one for each moments task."""
        return [
            f"{layout.stage_prefix(_moments_name(self.instance, self.cell, part))}/sums.safetensors"
            for part in range(len(moment_parts(self.job)))
        ]


class MomentsInputs(CellInputs):
    """Task inputs: a range of the chunks of one cell, as in `moment_parts`."""

    part: int


@dataclass(frozen=True)
class ManifoldPlan:
    """The tasks of one job."""

    job: ManifoldJob

    def table(self) -> PlanTable:
        """Returns the number of tasks in each phase."""
        job = self.job
        errors = f"{len(job.samples) * len(job.lambdas)} measurements, {job.draws} draws each"
        source = f"{job.source_samples} samples, {job.hidden} hidden units"
        moments = f"{job.moment_samples} samples a cell"
        rows = (
            TaskRow(phase="sources", tasks=len(self.sources()), work=source),
            TaskRow(phase="moments", tasks=len(self.moments()), work=moments),
            TaskRow(phase="baselines", tasks=len(self.baselines()), work=errors),
            TaskRow(phase="cells", tasks=len(self.cells()), work=errors),
        )
        return plan_table(job, tasks=rows)

    def sources(self) -> list[Task[CellInputs]]:
        """Returns the trainings of the source networks, one for each latent size."""
        cells = self.job.source_cells()
        return [Task(source_name(i.instance, i.cell), i) for i in self._inputs(cells)]

    def moments(self) -> list[Task[MomentsInputs]]:
        """Returns the Monte Carlo sums of every cell, in equal ranges of chunks."""
        return [
            Task(_moments_name(i.instance, i.cell, part), MomentsInputs(**dict(i), part=part))
            for i in self._inputs(self.job.cells())
            for part in range(len(moment_parts(self.job)))
        ]

    def baselines(self) -> list[Task[CellInputs]]:
        """Returns the measurements of random features and students trained from scratch."""
        cells = self.job.target_cells()
        return [Task(baseline_name(i.instance, i.cell), i) for i in self._inputs(cells)]

    def cells(self) -> list[Task[CellInputs]]:
        """Returns the measurements of transferred features."""
        cells = self.job.cells()
        return [Task(cell_name(i.instance, i.cell), i) for i in self._inputs(cells)]

    def _inputs(self, cells: Sequence[Cell]) -> list[CellInputs]:
        job = self.job.identity()
        return [
            CellInputs(job=job, instance=instance, cell=cell)
            for instance in range(job.instances)
            for cell in cells
        ]


def moment_parts(job: ManifoldJob) -> list[list[tuple[int, int]]]:
    """Returns the chunks of samples of each moments task of a cell, as (index, size)."""
    starts = range(0, job.moment_samples, CHUNK)
    chunks = [(i, min(CHUNK, job.moment_samples - start)) for i, start in enumerate(starts)]
    width = -(-len(chunks) // job.moment_tasks)
    return [chunks[first : first + width] for first in range(0, len(chunks), width)]


def source_name(instance: int, cell: Cell) -> str:
    """Returns the name of the task that trains the source of a cell."""
    return f"source-ds{cell.model.source_latent}-i{instance}"


def baseline_name(instance: int, cell: Cell) -> str:
    """Returns the name of the task that measures the baselines of a cell's target."""
    return f"baseline-dt{cell.model.target_latent}-i{instance}"


def cell_name(instance: int, cell: Cell) -> str:
    """Returns the name of the task that measures transferred features."""
    return f"cell-{cell.name}-i{instance}"


def _moments_name(instance: int, cell: Cell, part: int) -> str:
    return f"moments-{cell.name}-part{part}-i{instance}"
