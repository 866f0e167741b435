"""The specification of a job of kind `layer_search`: teacher, target data, episodes, search."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_tl.cluster.config import TrialsConfig
from dist_tl.config import StrictModel
from dist_tl.datasets.spec import DataConfig, MixtureConfig
from dist_tl.jobs.spec import BudgetConfig, JobConfig
from dist_tl.jobs.teacher import AnyTeacher, TeacherConfig
from dist_tl.methods.layer_search.episodes import EpisodesConfig
from dist_tl.methods.layer_search.features import PoolingConfig
from dist_tl.methods.layer_search.search import SearchConfig
from dist_tl.models.networks import NetworkConfig


class TrainedArmsConfig(StrictModel):
    """Arms that train a whole network on each support set: expensive, so on some episodes only."""

    episodes: int = Field(default=60, ge=1, description="Number of first episodes per series.")
    network: NetworkConfig = Field(description="Network that is trained from scratch.")
    training: BudgetConfig = Field(description="Batches are at most the size of the support.")
    arms: tuple[Literal["scratch", "fine_tuned"], ...] = ("scratch", "fine_tuned")


class HeldOutConfig(StrictModel):
    """Classes other than the target's; they decide the layers for one label a class."""

    data: DataConfig
    teacher: TeacherConfig | None = Field(
        default=None,
        description="A stand-in with the teacher's architecture, not trained on these classes; "
        "absent: the teacher, which must not be trained on them either.",
    )
    episodes: int = Field(default=200, ge=2, description="Number of one-shot episodes.")


class LayerSearchJob(JobConfig):
    """Selects the best feature maps of a teacher for few-shot tasks from support sets alone."""

    teacher: AnyTeacher
    data: DataConfig = Field(description="Target data; its classes should be new to the teacher.")
    held_out: HeldOutConfig | None = Field(
        default=None,
        description="Classes that decide the layers for one label a class; absent: the penultimate "
        "layer is used there.",
    )
    episodes: EpisodesConfig = Field(default_factory=EpisodesConfig)
    pooling: PoolingConfig = Field(default_factory=PoolingConfig)
    search: SearchConfig = Field(default_factory=SearchConfig)
    trained: TrainedArmsConfig | None = None
    export_shots: int | None = Field(
        default=None,
        ge=2,
        description="Labels per class for an exported model: the teacher with a head on layers "
        "selected for all classes, also fine-tuned if `trained` is set. Absent: no export.",
    )
    rows_per_task: int = Field(default=512, ge=1, description="Images per feature task.")
    episodes_per_task: int = Field(default=50, ge=1, description="Episodes per task.")
    trials: TrialsConfig = Field(default_factory=TrialsConfig, description="Resources of a task.")

    @model_validator(mode="after")
    def _one_shot_is_new(self) -> Self:
        held_out = self.held_out
        teacher = held_out and (held_out.teacher or self.teacher)
        if held_out is None or not isinstance(teacher, TeacherConfig):
            return self
        ours, theirs = held_out.data, teacher.data
        if isinstance(ours, MixtureConfig) or isinstance(theirs, MixtureConfig):
            return self
        if ours.source != theirs.source:
            return self
        shared = set(ours.classes or ()) & set(theirs.classes or ())
        if shared or ours.classes is None or theirs.classes is None:
            what = f"class {min(map(str, shared))}" if shared else "all classes of one source"
            raise ValueError(
                f"held_out: the teacher was trained on {what}, where its penultimate layer always "
                "wins; name classes that it has not seen, or a held_out.teacher without them"
            )
        return self
