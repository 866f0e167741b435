"""The forecast job: a teacher if one is to be trained, then one Ray task a feature map."""

from dataclasses import dataclass

from dist_tl.cluster.config import Task
from dist_tl.errors import ConfigError
from dist_tl.jobs.forecast.spec import ForecastJob, MapConfig, NetworkMap
from dist_tl.jobs.forecast.tasks import MapInputs, MapOutput, forecast_map
from dist_tl.jobs.phases import open_phases
from dist_tl.jobs.teacher import TeacherConfig, teacher_place, teacher_stage
from dist_tl.methods.hidden_manifold.forecast import POOL_PER_FEATURE
from dist_tl.report.results import StageRecord
from dist_tl.storage.attempts import Attempt
from dist_tl.telemetry import Progress
from dist_tl.train.rows import RowsSpec, load_rows


@dataclass(frozen=True)
class ForecastOutcome:
    """What every map came to."""

    job: ForecastJob
    maps: dict[str, MapOutput]
    stages: tuple[StageRecord, ...]
    peak_memory_bytes: int


def forecast_tasks(job: ForecastJob) -> list[Task[MapInputs]]:
    """One task a map.

    Raises:
        ConfigError: the data cannot give as many items as the job asks for.
        DataError: it is damaged.
    """
    pool = len(load_rows(RowsSpec(data=job.data)))
    if pool < max(job.labelled + 1, POOL_PER_FEATURE * job.components):
        raise ConfigError(
            f"data: {job.components} components and {job.labelled} labels need "
            f"{max(job.labelled + 1, POOL_PER_FEATURE * job.components)} images, there are {pool}; "
            "keep fewer components"
        )
    return [Task(f"forecast-{chosen.name}", _asked(job, chosen)) for chosen in job.maps]


def _asked(job: ForecastJob, chosen: MapConfig) -> MapInputs:
    model = None
    if isinstance(chosen, NetworkMap):
        model = chosen.model or (teacher_place(job.teacher) if job.teacher else None)
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


def run_forecast(job: ForecastJob, attempt: Attempt, progress: Progress) -> ForecastOutcome:
    """Train the teacher where the job has one to train, then forecast every map.

    Raises:
        DistTLError: the named error that a task met; what is done stays done.
    """
    tasks = forecast_tasks(job)
    teacher = job.teacher if isinstance(job.teacher, TeacherConfig) else None
    stages = [] if teacher is None else [teacher_stage(teacher, seed=job.seed)]
    with open_phases(job, job.trials, attempt, progress) as phases:
        phases.train("teacher", stages)
        answers = phases.run("feature maps", forecast_map, tasks, MapOutput)
        memory = phases.peak_memory_bytes
    names = [chosen.name for chosen in job.maps]
    return ForecastOutcome(
        job, dict(zip(names, answers, strict=True)), tuple(phases.records), memory
    )
