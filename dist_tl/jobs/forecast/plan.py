"""Plans a forecast: a teacher if the job trains one, then one task for each feature map."""

from dataclasses import dataclass

from dist_tl.cluster.config import Task
from dist_tl.errors import ConfigError
from dist_tl.jobs.forecast.spec import ForecastJob, MapConfig, NetworkMap
from dist_tl.jobs.forecast.tasks import MapInputs
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.jobs.teacher import teacher_location, teacher_stages
from dist_tl.methods.hidden_manifold.forecast import POOL_PER_FEATURE
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec


def plan(job: ForecastJob, store: ObjectStore) -> "ForecastPlan":
    """The stages and tasks of a job.

    Raises:
        ConfigError: the data has fewer images than the job needs.
        DataError: the data is damaged.
    """
    needed = max(job.labelled + 1, POOL_PER_FEATURE * job.components)
    available = len(load_rows(RowsSpec(data=job.data)))
    if available < needed:
        raise ConfigError(
            f"data: {job.components} components and {job.labelled} labels need {needed} images, "
            f"there are {available}; keep fewer components"
        )
    return ForecastPlan(job)


@dataclass(frozen=True)
class ForecastPlan:
    """The stages and tasks of one job."""

    job: ForecastJob

    def table(self) -> PlanTable:
        """The teacher's training and the tasks."""
        job = self.job
        work = f"{len(job.sizes)} sizes, {len(job.lambdas)} penalties, {job.labelled} labels"
        row = TaskRow(phase="feature maps", tasks=len(self.maps()), work=work)
        return plan_table(job, tasks=(row,), train=self.teachers())

    def teachers(self) -> list[StageSpec]:
        """The training of the teacher, if the job trains one."""
        return teacher_stages(self.job.teacher, seed=self.job.seed)

    def maps(self) -> list[Task[MapInputs]]:
        """One task for each feature map."""
        return [Task(f"forecast-{chosen.name}", self._inputs(chosen)) for chosen in self.job.maps]

    def _inputs(self, chosen: MapConfig) -> MapInputs:
        job, model = self.job, None
        if isinstance(chosen, NetworkMap):
            model = chosen.model or (teacher_location(job.teacher) if job.teacher else None)
        return MapInputs(
            seed=job.seed,
            data=job.data,
            map=chosen,
            model=model,
            components=job.components,
            labelled=job.labelled,
            sizes=job.sizes,
            lambdas=job.lambdas,
            checked=job.checked,
            draws=job.draws,
            bootstrap=job.bootstrap,
            verify=job.verify,
        )
