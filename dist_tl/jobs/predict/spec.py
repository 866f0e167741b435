"""The specification of a job of kind `predict`: a stored hub, samples, and the experts' actors.

Imports neither ray nor deepspeed.
"""

from typing import Self

from pydantic import Field, model_validator

from dist_tl.cluster.config import ExpertsConfig
from dist_tl.cluster.inputs import StageInput
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.spec import JobConfig, ModelPlace


class PredictJob(JobConfig):
    """Predicts samples with a stored hub; give exactly one of `data` and `shards`."""

    model: ModelPlace = Field(description="Folder or URL of a hub, e.g. RUN/models/hub_k2-seed0.")
    data: DataConfig | None = Field(default=None, description="Samples that fit into memory.")
    shards: StageInput | None = Field(
        default=None, description="Shards of a stage: any number of samples in bounded memory."
    )
    samples_per_shard: int = Field(
        default=256, ge=1, description="Samples per shard of predictions, if `data` is given."
    )
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    degrade: bool = Field(
        default=False,
        description="Leave out an expert that does not start, and mark the samples that miss it, "
        "instead of failing.",
    )

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.data is None) == (self.shards is None):
            raise ValueError("expected exactly one of data and shards")
        return self
