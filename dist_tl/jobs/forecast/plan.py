"""Plans a forecast: the training of a teacher if needed, then one task for each feature map."""

from dataclasses import dataclass

from dist_tl.cluster.config import Task
from dist_tl.config import StrictModel
from dist_tl.errors import ConfigError
from dist_tl.jobs.forecast.spec import ForecastJob
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.jobs.stages import drawn_items
from dist_tl.jobs.teacher import teacher_stages
from dist_tl.methods.hidden_manifold.forecast import POOL_PER_FEATURE
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec


def plan(job: ForecastJob, store: ObjectStore) -> "ForecastPlan":
    """Returns the stages and tasks of a job.

    Raises:
        ConfigError: the data has fewer images than the job needs.
        DataError: the data is damaged.
    """
    needed = max(job.labelled + 1, POOL_PER_FEATURE * job.components)
    available = len(drawn_items(job, load_rows(RowsSpec(data=job.data))))
    if available < needed:
        raise ConfigError(
            f"data: {job.components} components and {job.labelled} labels need {needed} images, "
            f"there are {available}; keep fewer components"
        )
    return ForecastPlan(job)


class MapInputs(StrictModel):
    """Task inputs: one feature map of the job."""

    job: ForecastJob
    index: int


@dataclass(frozen=True)
class ForecastPlan:
    """The stages and tasks of one job."""

    job: ForecastJob

    def table(self) -> PlanTable:
        """Returns the teacher's training and the number of tasks."""
        job = self.job
        work = f"{len(job.sizes)} sizes, {len(job.lambdas)} penalties, {job.labelled} labels"
        row = TaskRow(phase="feature maps", tasks=len(job.maps), work=work)
        return plan_table(job, tasks=(row,), train=self.teachers())

    def teachers(self) -> list[StageSpec]:
        """Returns the training of the teacher, if the job trains one."""
        return teacher_stages(self.job.teacher, seed=self.job.seed)

    def maps(self) -> list[Task[MapInputs]]:
        """Returns one task for each feature map."""
        job = self.job.identity()
        return [
            Task(f"forecast-{candidate.name}", MapInputs(job=job, index=index))
            for index, candidate in enumerate(job.maps)
        ]
