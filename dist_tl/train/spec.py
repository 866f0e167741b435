"""The specification and the result of a training stage."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any, Self

from pydantic import Field, model_validator

from dist_tl.config import StrictModel, fingerprint
from dist_tl.datasets.views import ViewsConfig
from dist_tl.errors import CheckpointMismatchError
from dist_tl.shards.order import ShardPlan
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import damaged, read_record
from dist_tl.train.cached import CachedHub
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import EngineConfig, OptimizerConfig
from dist_tl.train.hub_model import NewHub
from dist_tl.train.models import ImageShape, ModelSpec, Readout
from dist_tl.train.objectives import HubSpec, ObjectiveSpec, ReadoutSpec
from dist_tl.train.rows import RowsSpec


class StageSpec(StrictModel):
    """All settings that determine the result of a stage."""

    name: str
    seed: int = Field(description="Seed of initial weights, row order, views and noise.")
    model: ModelSpec
    objective: ObjectiveSpec
    image_shape: ImageShape
    labelled: RowsSpec | ShardPlan = Field(description="Training rows with labels.")
    unlabelled: RowsSpec | ShardPlan | None = Field(
        default=None, description="Training rows without labels."
    )
    views: ViewsConfig
    steps: int = Field(ge=1, description="Optimizer steps.")
    batch_size: int = Field(ge=1, description="Labelled rows per step, summed over all workers.")
    unlabelled_batch_size: int = Field(default=0, ge=0)
    lanes: int = Field(ge=1)
    optimizer: OptimizerConfig
    engine: EngineConfig
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Decay of a moving average of the weights; if set, the average is stored.",
    )
    evaluate: RowsSpec | None = Field(
        default=None, description="Rows to measure the final accuracy on."
    )
    checkpoints: CheckpointConfig
    shard_timeout_s: float = Field(default=600.0, gt=0, description="Seconds to wait for a shard.")

    @model_validator(mode="after")
    def _check_readout(self) -> Self:
        if isinstance(self.objective, ReadoutSpec):
            if not isinstance(self.model, Readout) or self.model.num_classes != 2:
                raise ValueError("objective readout: expected a model of kind readout, two classes")
            if self.engine.zero_stage == 3:
                # The penalty reads the head outside a forward pass, where stage 3 partitions it.
                raise ValueError("objective readout: works with engine.zero_stage 0 to 2, got 3")
        return self

    @model_validator(mode="after")
    def _check_hub(self) -> Self:
        is_hub = isinstance(self.model, NewHub | CachedHub)
        if is_hub != isinstance(self.objective, HubSpec):
            raise ValueError("objective hub requires a model of kind hub, and vice versa")
        return self

    @property
    def fingerprint(self) -> str:
        """Hash of all settings that change the result."""
        return fingerprint(self.model_dump(mode="json", exclude={"checkpoints", "shard_timeout_s"}))


class StageResult(StrictModel):
    """The result of a stage; written last. Times are Unix seconds."""

    name: str
    fingerprint: str
    world_size: int
    started: float
    first_step_at: float | None
    ended: float
    seconds: float = Field(description="Wall-clock seconds, summed over resumed attempts.")
    steps: int
    samples: int = Field(
        description="Number of images seen, labelled and unlabelled, with repeats."
    )
    seconds_starved: float = Field(description="Seconds spent waiting for shards on rank 0.")
    seconds_saving: float = Field(description="Seconds blocked by checkpoint saves on rank 0.")
    final_loss: float
    metrics_sha256: str = Field(default="", description="SHA-256 of metrics.jsonl.")
    notes: tuple[str, ...] = Field(default=(), description="Damage that was found and mended.")
    predictions: tuple[int, ...] = Field(
        default=(), description="Predicted class of each evaluated row, in order."
    )
    correct: tuple[bool, ...] = Field(default=(), description="Whether each prediction is correct.")
    last_step_correct: tuple[bool, ...] = Field(
        default=(),
        description="`correct` of the last step's weights, if their average is stored.",
    )

    @property
    def accuracy(self) -> float:
        """Fraction of the evaluated rows whose prediction is correct."""
        return sum(self.correct) / max(1, len(self.correct))


def read_result(store: ObjectStore, spec: StageSpec) -> StageResult | None:
    """Returns the stage's result, or None if the stage is not finished.

    Raises:
        CheckpointMismatchError: another specification made the result.
        DamagedError: the result is not the one that was written.
    """
    result = _stored_result(store, spec.name)
    if result is None:
        return None
    if result.fingerprint != spec.fingerprint:
        raise CheckpointMismatchError(
            f"stage {spec.name} was done by another job ({result.fingerprint}, this one is "
            f"{spec.fingerprint}); use another run name"
        )
    return result


def stored_results(store: ObjectStore, names: Iterable[str]) -> dict[str, StageResult]:
    """Returns the results of finished stages by name, for reports: fingerprints are not checked."""
    stored = {name: _stored_result(store, name) for name in names}
    return {name: result for name, result in stored.items() if result is not None}


def _stored_result(store: ObjectStore, name: str) -> StageResult | None:
    remedy = "start the same job again, which trains the stage again"
    return read_record(store, layout.result_key(name), StageResult, remedy=remedy)


def read_metrics(store: ObjectStore, result: StageResult) -> list[dict[str, Any]]:
    """Returns the metric rows of a finished stage.

    Raises:
        DamagedError: they are not the ones that were written.
    """
    key = layout.metrics_key(result.name)
    data = store.read_or_none(key) or b""
    if hashlib.sha256(data).hexdigest() != result.metrics_sha256:
        remedy = "start the same job again, which trains the stage again"
        raise damaged(key, "its SHA-256 is not the one in the stage's result", remedy=remedy)
    return [json.loads(line) for line in data.splitlines()]
