"""Runs a forecast: the teacher's training, then every feature map as a Ray task."""

from dataclasses import dataclass

from dist_tl.jobs.forecast.plan import ForecastPlan
from dist_tl.jobs.forecast.spec import ForecastJob
from dist_tl.jobs.forecast.tasks import MapOutput, forecast_map
from dist_tl.jobs.workers import Workers


@dataclass(frozen=True)
class ForecastOutcome:
    """The forecast of every feature map, by name."""

    job: ForecastJob
    maps: dict[str, MapOutput]


def run(plan: ForecastPlan, workers: Workers) -> ForecastOutcome:
    """Trains the teacher if the job defines one, then forecasts every map.

    Raises:
        DistTLError: the named error of a task; finished tasks are kept.
    """
    workers.train_apart("teacher", plan.teachers())
    outputs = workers.run_tasks("feature maps", forecast_map, plan.maps(), MapOutput)
    names = [candidate.name for candidate in plan.job.maps]
    return ForecastOutcome(plan.job, dict(zip(names, outputs, strict=True)))
