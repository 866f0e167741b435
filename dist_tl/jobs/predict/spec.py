"""What a job of kind `predict` can say: a stored hub, the samples, and the experts' actors.

Imports neither ray nor deepspeed.
"""

from typing import Self

from pydantic import Field, model_validator

from dist_tl.cluster.config import ExpertsConfig
from dist_tl.cluster.inputs import StageInput
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.spec import JobConfig, ModelPlace


class PredictJob(JobConfig):
    """Have a stored hub answer samples; give exactly one of `data` and `shards`."""

    model: ModelPlace = Field(description="Folder or URL of a hub, e.g. RUN/models/hub_k2-seed0.")
    data: DataConfig | None = Field(default=None, description="Samples that fit into memory.")
    shards: StageInput | None = Field(
        default=None, description="Shards of a stage: any number of samples in bounded memory."
    )
    samples_per_shard: int = Field(
        default=256, ge=1, description="Of the predictions, with `data`."
    )
    experts: ExpertsConfig = Field(default_factory=ExpertsConfig)
    degrade: bool = Field(
        default=False,
        description="Leave an expert out that stays away, and mark the samples that miss it, "
        "instead of giving up.",
    )

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.data is None) == (self.shards is None):
            raise ValueError("expected exactly one of data and shards")
        return self
