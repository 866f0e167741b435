"""Plans predictions: the stored hub, its input, and the shards of its predictions."""

from dataclasses import dataclass

from dist_tl.cluster.inputs import RowsInput, StageInput, input_plan, input_shape
from dist_tl.config import fingerprint
from dist_tl.errors import ConfigError
from dist_tl.jobs.plan import PlanTable, TaskRow, plan_table
from dist_tl.jobs.predict.spec import PredictJob
from dist_tl.jobs.versions import versions
from dist_tl.shards.manifest import StageManifest
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import HubFile, check_hub, hub_fingerprint
from dist_tl.train.rows import RowsSpec

STAGE = "predictions"


@dataclass(frozen=True)
class PredictPlan:
    """A stored hub and the shards of its predictions."""

    job: PredictJob
    hub: HubFile
    shards: ShardPlan

    def table(self) -> PlanTable:
        """The predictions as one phase."""
        count, k = len(self.hub.experts), self.hub.routes.k
        work = f"{self.shards.num_samples} samples, {count} experts, k = {k}"
        row = TaskRow(phase="predictions", tasks=self.shards.num_shards, work=work)
        return plan_table(self.job, tasks=(row,))

    def manifest(self) -> StageManifest:
        """The manifest of the predictions."""
        return StageManifest(
            plan=self.shards,
            kind="predictions",
            condition="none",
            image_shape=(self.hub.num_classes, 1, 1),
            num_classes=self.hub.num_classes,
            generator="hub",
            created_by=versions(),
        )


def plan(job: PredictJob, store: ObjectStore) -> PredictPlan:
    """Checks that the hub and the input exist and fit.

    Raises:
        ConfigError: there is no such hub or input, or they do not fit.
    """
    hub = check_hub(store, job.model)
    source = job_input(job)
    shape = tuple(input_shape(source))
    if shape != tuple(hub.image_shape):
        raise ConfigError(
            f"the hub at {job.model} takes images of (channels, height, width) "
            f"{tuple(hub.image_shape)}, the input has {shape}; set its size and channels"
        )
    unknown = sorted(set(job.experts.resources) - set(hub.experts))
    if unknown:
        raise ConfigError(
            f"experts.resources: the hub has no expert {unknown[0]}; it has "
            f"{', '.join(hub.experts)}"
        )
    needed = job.experts.min * len(hub.experts) * job.experts.cpus
    needed += job.experts.routers * job.experts.router_cpus
    if job.session.num_cpus < needed:
        raise ConfigError(
            f"session.num_cpus: {len(hub.experts)} experts and {job.experts.routers} routers "
            f"need {needed:g}, got {job.session.num_cpus}. These are shares, not cores: more of "
            "them than the machine has are fine"
        )
    shards = input_plan(source).model_copy(
        update={
            "stage": STAGE,
            "purpose": STAGE,
            "format": "npy",
            "fingerprint": fingerprint(
                [hub_fingerprint(store, job.model), source.model_dump(mode="json")]
            ),
        }
    )
    return PredictPlan(job, hub, shards)


def job_input(job: PredictJob) -> StageInput | RowsInput:
    """Where the samples are."""
    if job.shards is not None:
        # Actors have working folders of their own: a path is made absolute here.
        return job.shards.model_copy(update={"run": ObjectStore(job.shards.run).url})
    assert job.data is not None, "the job has one of both"
    return RowsInput(rows=RowsSpec(data=job.data), samples_per_shard=job.samples_per_shard)
