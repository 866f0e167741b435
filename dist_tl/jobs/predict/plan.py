"""Plans predictions: the stored hub, its input, and the shards of its predictions."""

from dataclasses import dataclass
from typing import Any

from dist_tl.cluster.inputs import RowsInput, StageInput, input_manifest, input_plan, input_shape
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
    """A stored hub, its input, and the manifest of its predictions."""

    job: PredictJob
    hub: HubFile
    source: StageInput | RowsInput
    manifest: StageManifest

    @property
    def shards(self) -> ShardPlan:
        """The shards of the predictions, one for each shard of the input."""
        return self.manifest.plan

    def table(self) -> PlanTable:
        """Returns the predictions as one phase."""
        count, k = len(self.hub.experts), self.hub.routes.k
        work = f"{self.shards.num_samples} samples, {count} experts, k = {k}"
        row = TaskRow(phase=STAGE, tasks=self.shards.num_shards, work=work)
        return plan_table(self.job, tasks=[row])


def plan(job: PredictJob, store: ObjectStore) -> PredictPlan:
    """Checks that the hub and the input exist and fit.

    Raises:
        ConfigError: the hub or the input is missing, or they do not fit.
    """
    hub, source = check_hub(store, job.model), _input(job)
    shape = tuple(input_shape(source))
    if shape != tuple(hub.image_shape):
        raise ConfigError(
            f"the hub at {job.model} takes images of (channels, height, width) "
            f"{tuple(hub.image_shape)}, the input has {shape}; set its size and channels"
        )
    experts, count = job.experts, len(hub.experts)
    if unknown := sorted(set(experts.resources) - set(hub.experts)):
        raise ConfigError(
            f"experts.resources: the hub has no expert {unknown[0]}; it has "
            f"{', '.join(hub.experts)}"
        )
    needed = experts.min * count * experts.cpus + experts.routers * experts.router_cpus
    if job.session.num_cpus < needed:
        raise ConfigError(
            f"session.num_cpus: {count} experts and {experts.routers} routers need {needed:g}, got "
            f"{job.session.num_cpus}. These are shares, not cores: they may exceed the cores of "
            "the machine"
        )
    identity = fingerprint([hub_fingerprint(store, job.model), _content(source)])
    fields = {"stage": STAGE, "purpose": STAGE, "format": "npy", "fingerprint": identity}
    manifest = StageManifest(
        plan=input_plan(source).model_copy(update=fields),
        kind=STAGE,
        condition="none",
        image_shape=(hub.num_classes, 1, 1),
        num_classes=hub.num_classes,
        generator="hub",
        created_by=versions(),
    )
    return PredictPlan(job, hub, source, manifest)


def _content(source: StageInput | RowsInput) -> Any:
    """What identifies the input, wherever it lies: shards follow from their manifest."""
    if isinstance(source, StageInput):
        return input_manifest(source).fingerprint
    return source.model_dump(mode="json")


def _input(job: PredictJob) -> StageInput | RowsInput:
    if job.shards is not None:
        # Actors have other working folders, so a path must be absolute.
        return job.shards.model_copy(update={"run": ObjectStore(job.shards.run).url})
    assert job.data is not None, "the job has exactly one of both"
    return RowsInput(rows=RowsSpec(data=job.data), samples_per_shard=job.samples_per_shard)
