"""Plans a hub job: its stages and tasks, warm starts included, and what every hub costs."""

from dist_tl.jobs.hub.cost import cost_table
from dist_tl.jobs.hub.spec import HubJob
from dist_tl.jobs.hub.stages import HubStages
from dist_tl.jobs.hub.warm_start import WarmStart
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import load_rows


def plan(job: HubJob, store: ObjectStore) -> "HubPlan":
    """The stages and tasks of a job.

    Raises:
        ConfigError: data or an expert does not fit; names the expert, its input and the target's.
        DataError: data is damaged.
    """
    plan = HubPlan(job, store)
    load_rows(plan.rows(0, "train"))
    load_rows(plan.rows(0, "train", held_out=True))
    assert plan.experts, "building them checks them"
    return plan


class HubPlan(HubStages):
    """All stages and tasks of a job."""

    @property
    def warm_start(self) -> WarmStart | None:
        """The warm starts of the arms; None if the job has none."""
        return WarmStart(self, self.job.warm_start) if self.job.warm_start else None

    def table(self) -> PlanTable:
        """Trainings, tasks by phase, and the cost of every expert and hub."""
        warm, first = self.warm_start, self.job.hub[0].name
        stages = self.pretraining()
        for repeat in range(self.job.seeds):
            stages += warm.starts(repeat) if warm else []
            stages += [*self.picks(repeat), *self.singles(repeat)]
            stages += [self.arm(arm, repeat, best=first) for arm in self.model_arms()]
        rows = [
            *(warm.task_rows() if warm else ()),
            TaskRow(
                phase="evaluation",
                tasks=len(self.evaluation_keys()),
                work="routes on the test split",
            ),
            TaskRow(phase="timing", tasks=1, work="every arm, one after another"),
        ]
        return plan_table(self.job, train=stages, tasks=rows, tables=(cost_table(self),))
