"""What a training stage is asked for, and what it comes to."""

from collections.abc import Iterable
from typing import Self

from pydantic import Field, model_validator

from dist_tl.config import StrictModel, fingerprint
from dist_tl.datasets.views import ViewsConfig
from dist_tl.errors import CheckpointMismatchError
from dist_tl.shards.order import ShardPlan
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.cached import CachedHub
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import EngineConfig, OptimizerConfig
from dist_tl.train.hub_model import NewHub
from dist_tl.train.models import ImageShape, ModelSpec, Readout
from dist_tl.train.objectives import HubSpec, ObjectiveSpec, ReadoutSpec
from dist_tl.train.rows import RowsSpec


class StageSpec(StrictModel):
    """Everything that fixes what a stage computes."""

    name: str
    seed: int = Field(description="Fixes initial weights, order of rows, views and noise.")
    model: ModelSpec
    objective: ObjectiveSpec
    image_shape: ImageShape
    labelled: RowsSpec | ShardPlan = Field(description="What is learnt from with labels.")
    unlabelled: RowsSpec | ShardPlan | None = Field(
        default=None, description="Seen without labels."
    )
    views: ViewsConfig
    steps: int = Field(ge=1, description="Optimizer steps.")
    batch_size: int = Field(ge=1, description="Labelled rows per step, over all workers.")
    unlabelled_batch_size: int = Field(default=0, ge=0)
    lanes: int = Field(ge=1)
    optimizer: OptimizerConfig
    engine: EngineConfig
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Store the moving average of the weights instead of the last.",
    )
    evaluate: RowsSpec | None = Field(
        default=None, description="What accuracy is measured on, at the end."
    )
    checkpoints: CheckpointConfig
    shard_timeout_s: float = Field(default=600.0, gt=0, description="How long to wait for a shard.")

    @model_validator(mode="after")
    def _readout_is_whole(self) -> Self:
        if isinstance(self.objective, ReadoutSpec):
            if not isinstance(self.model, Readout) or self.model.num_classes != 2:
                raise ValueError("objective readout: expected a model of kind readout, two classes")
            if self.engine.zero_stage == 3:
                # Its penalty reads the head outside a forward pass, where stage 3 has it in pieces.
                raise ValueError("objective readout: works with engine.zero_stage 0 to 2, got 3")
        return self

    @model_validator(mode="after")
    def _hub_is_whole(self) -> Self:
        is_hub = isinstance(self.model, NewHub | CachedHub)
        if is_hub != isinstance(self.objective, HubSpec):
            raise ValueError("objective hub goes with a model of kind hub, and only with it")
        return self

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the result."""
        return fingerprint(self.model_dump(mode="json", exclude={"checkpoints", "shard_timeout_s"}))


class StageResult(StrictModel):
    """What a stage came to; written last. Times are Unix seconds."""

    name: str
    fingerprint: str
    world_size: int
    started: float
    first_step_at: float | None
    ended: float
    seconds: float = Field(description="Wall-clock seconds, over all attempts that were resumed.")
    steps: int
    samples: int = Field(description="Images seen, labelled and unlabelled, repeats counted.")
    seconds_starved: float = Field(description="Waiting for shards, rank 0.")
    seconds_saving: float = Field(description="Blocked in checkpoints, rank 0.")
    final_loss: float
    predictions: tuple[int, ...] = Field(
        default=(), description="Class of each evaluated row, in order."
    )
    correct: tuple[bool, ...] = Field(default=(), description="Whether each prediction is right.")
    last_step_correct: tuple[bool, ...] = Field(
        default=(),
        description="The same for the last step's weights, where the model is their average.",
    )

    @property
    def accuracy(self) -> float:
        """Share of the evaluated rows that are right."""
        return sum(self.correct) / max(1, len(self.correct))


def read_result(store: ObjectStore, spec: StageSpec) -> StageResult | None:
    """The stage's result; None where it is not done.

    Raises:
        CheckpointMismatchError: the result was made by another specification.
    """
    data = store.read_or_none(layout.result_key(spec.name))
    if data is None:
        return None
    result = StageResult.model_validate_json(data)
    if result.fingerprint != spec.fingerprint:
        raise CheckpointMismatchError(
            f"stage {spec.name} was done by another job ({result.fingerprint}, this one is "
            f"{spec.fingerprint}); use another run name"
        )
    return result


def stored_results(store: ObjectStore, names: Iterable[str]) -> dict[str, StageResult]:
    """Results of stages that are done, by name; for reports, so without comparing anything."""
    found = {name: store.read_or_none(layout.result_key(name)) for name in names}
    return {
        name: StageResult.model_validate_json(data)
        for name, data in found.items()
        if data is not None
    }
