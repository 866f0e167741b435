"""The specification of a job of kind `forecast`: target data and candidate feature maps."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dist_tl.cluster.config import TrialsConfig
from dist_tl.config import StrictModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.spec import NAME, JobConfig, ModelPlace
from dist_tl.jobs.teacher import AnyTeacher
from dist_tl.methods.hidden_manifold.forecast import LABELS_PER_FEATURE
from dist_tl.methods.hidden_manifold.saddle_point import MIN_LAM


class PixelMap(StrictModel):
    """The pixels of the images."""

    kind: Literal["pixels"]
    name: str = Field(default="pixels", pattern=NAME)


class RandomMap(StrictModel):
    """One layer of random weights: features without any training."""

    kind: Literal["random"]
    name: str = Field(default="random", pattern=NAME)
    hidden: int = Field(default=200, ge=1, description="Hidden units.")
    gain: float = Field(default=2.0, gt=0, description="Factor inside tanh, over sqrt(inputs).")


class NetworkMap(StrictModel):
    """A block of a trained network: the teacher's, or a hub expert's."""

    kind: Literal["network"]
    name: str = Field(pattern=NAME)
    model: ModelPlace | None = Field(
        default=None, description="Folder or URL of the network; absent: the job's teacher."
    )
    block: int = Field(
        default=-1, description="Index among all blocks in depth order; -1: the head's input."
    )
    grid: int = Field(
        default=2, ge=1, le=8, description="Maps are averaged to grid x grid cells at most."
    )


MapConfig = Annotated[PixelMap | RandomMap | NetworkMap, Field(discriminator="kind")]


class ForecastJob(JobConfig):
    """How much labelled target data would each feature map need?"""

    data: DataConfig = Field(
        description="Target data; labels beyond `labelled` are only read if `verify` is set."
    )
    maps: tuple[MapConfig, ...] = Field(min_length=1, description="Candidates with unique names.")
    teacher: AnyTeacher | None = Field(default=None, description="Network of maps without a model.")
    components: int = Field(
        default=40, ge=1, description="Leading principal components kept of each map's features, K."
    )
    labelled: int = Field(default=200, ge=10, description="Labels used by the forecast, >= 5 K.")
    samples: tuple[int, ...] = Field(
        default=(20, 40, 60, 100, 200, 400, 1000, 3000),
        min_length=1,
        description="Training set sizes n to forecast.",
    )
    lambdas: tuple[float, ...] = Field(
        default=(1e-4, 1e-3, 1e-2, 1e-1, 1.0), min_length=1, description="Candidate L2 penalties."
    )
    checked: tuple[int, ...] = Field(
        default=(20, 40, 60), min_length=1, description="Sizes to measure, `labelled` / 3 at most."
    )
    draws: int = Field(default=20, ge=10, description="Labelled sets drawn for each measured size.")
    bootstrap: int = Field(
        default=100, ge=0, description="Resamples of the labelled items for the confidence band."
    )
    target_mse: tuple[float, ...] = Field(
        default=(0.25, 0.2, 0.15), description="Errors for which the labels needed are reported."
    )
    verify: bool = Field(
        default=False, description="Measure every size with all labels of the data, as a benchmark."
    )
    trials: TrialsConfig = Field(
        default_factory=TrialsConfig, description="Resources and retries of the tasks."
    )

    @model_validator(mode="after")
    def _fields_are_consistent(self) -> Self:
        names = [candidate.name for candidate in self.maps]
        if len(set(names)) < len(names):
            raise ValueError(f"maps: every name once, got {names}")
        bare = [m.name for m in self.maps if isinstance(m, NetworkMap) and m.model is None]
        if bare and self.teacher is None:
            raise ValueError(f"teacher: missing, and the map {bare[0]} names no model of its own")
        if min(self.samples) < 1 or min(self.checked) < 1:
            raise ValueError("samples, checked: expected sizes of 1 or more")
        if self.labelled < LABELS_PER_FEATURE * self.components:
            raise ValueError(
                f"{self.components} components need {LABELS_PER_FEATURE * self.components} "
                f"labelled items, got {self.labelled}; label more, or keep "
                f"{self.labelled // LABELS_PER_FEATURE} principal components or fewer"
            )
        if max(self.checked) > self.labelled // 3:
            raise ValueError(
                f"checked: expected sizes of a third of the {self.labelled} labelled items at most "
                f"({self.labelled // 3}), got {max(self.checked)}"
            )
        if min(self.lambdas) < MIN_LAM:
            raise ValueError(f"lambdas: expected {MIN_LAM:g} or more, got {min(self.lambdas):g}")
        return self

    @property
    def sizes(self) -> tuple[int, ...]:
        """All forecast sizes in ascending order, including the measured ones."""
        return tuple(sorted({*self.samples, *self.checked}))
