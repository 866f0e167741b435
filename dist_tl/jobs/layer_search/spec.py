"""What a job of kind `layer_search` can say: a frozen teacher, target data, episodes, a search."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_tl.cluster.config import TrialsConfig
from dist_tl.config import StrictModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.spec import BudgetConfig, JobConfig
from dist_tl.jobs.teacher import AnyTeacher, TeacherConfig
from dist_tl.methods.layer_search.episodes import EpisodesConfig
from dist_tl.methods.layer_search.features import PoolingConfig
from dist_tl.methods.layer_search.search import SearchConfig
from dist_tl.models.networks import NetworkConfig


class TrainedArmsConfig(StrictModel):
    """Arms that train a whole network on each support set: dear, so on some episodes only."""

    episodes: int = Field(
        default=60, ge=1, description="The first so many episodes of each series."
    )
    network: NetworkConfig = Field(description="Trained from scratch; fine-tuned is the teacher.")
    training: BudgetConfig = Field(description="batch_size rows a step, at most the support.")
    arms: tuple[Literal["scratch", "fine_tuned"], ...] = ("scratch", "fine_tuned")


class HeldOutConfig(StrictModel):
    """New classes other than the target's, on which the set for one label a class is found."""

    data: DataConfig
    teacher: TeacherConfig | None = Field(
        default=None,
        description="A stand-in of the teacher's architecture that was not trained on these "
        "classes; absent: the teacher itself, which must not have been.",
    )
    episodes: int = Field(default=200, ge=2, description="One-shot episodes.")


class LayerSearchJob(JobConfig):
    """Which feature maps of a teacher serve few-shot tasks best, chosen from support sets alone."""

    teacher: AnyTeacher
    data: DataConfig = Field(description="Target data; its classes should be new to the teacher.")
    held_out: HeldOutConfig | None = Field(
        default=None,
        description="For one label a class; absent: the penultimate layer is used there.",
    )
    episodes: EpisodesConfig = Field(default_factory=EpisodesConfig)
    pooling: PoolingConfig = Field(default_factory=PoolingConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    trained: TrainedArmsConfig | None = None
    export_shots: int | None = Field(
        default=None,
        ge=2,
        description="Also choose layers for all classes of the data from so many labels each, and "
        "export the teacher with a head on them, as it is and fine-tuned as `trained` says.",
    )
    rows_per_task: int = Field(default=512, ge=1, description="Images of one feature task.")
    episodes_per_task: int = Field(
        default=50, ge=1, description="Episodes of one task: enough to pay for its dispatch."
    )
    trials: TrialsConfig = Field(default_factory=TrialsConfig, description="How tasks are run.")

    @model_validator(mode="after")
    def _one_shot_is_new(self) -> Self:
        held_out = self.held_out
        if held_out is None or not isinstance(held_out.teacher or self.teacher, TeacherConfig):
            return self
        teacher = held_out.teacher or self.teacher
        assert isinstance(teacher, TeacherConfig), "checked above"
        ours, theirs = held_out.data, teacher.data
        if ours.source != theirs.source or ours.source == "mixture":
            return self
        shared = set(ours.classes or ()) & set(theirs.classes or ())
        if shared or ours.classes is None or theirs.classes is None:
            what = f"class {min(map(str, shared))}" if shared else "all classes of one source"
            raise ValueError(
                f"held_out: the teacher was trained on {what}, where its penultimate layer always "
                "wins; name classes that it has not seen, or a held_out.teacher without them"
            )
        return self
