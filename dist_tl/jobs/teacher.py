"""A frozen network to take features from: stored already, or trained first in the run.

Imports neither ray nor deepspeed.
"""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from dist_tl.config import StrictModel
from dist_tl.datasets.spec import DataConfig
from dist_tl.jobs.spec import BudgetConfig, ModelPlace
from dist_tl.models.networks import NetworkConfig
from dist_tl.storage import layout
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import EngineConfig
from dist_tl.train.models import NewNetwork
from dist_tl.train.objectives import SupervisedSpec
from dist_tl.train.rows import RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

TEACHER = "teacher"


class TeacherConfig(StrictModel):
    """A classifier that the run trains first, in place of a downloaded one."""

    data: DataConfig
    network: NetworkConfig
    training: BudgetConfig


class StoredTeacher(StrictModel):
    """A classifier that exists already."""

    model: ModelPlace = Field(description="Folder or URL with model.safetensors and config.json.")


def _one_kind(teacher: Any) -> Any:
    # A union's errors name every member; choosing first keeps the message to the point.
    if isinstance(teacher, Mapping):
        return (StoredTeacher if "model" in teacher else TeacherConfig).model_validate(teacher)
    return teacher


AnyTeacher = Annotated[TeacherConfig | StoredTeacher, BeforeValidator(_one_kind)]


def teacher_location(teacher: TeacherConfig | StoredTeacher) -> str:
    """The location of the teacher's files: a key of the run, or the URL that the job names."""
    if isinstance(teacher, StoredTeacher):
        return teacher.model
    return layout.stage_model_prefix(TEACHER)


def teacher_stages(
    teacher: TeacherConfig | StoredTeacher | None, *, seed: int, name: str = TEACHER
) -> list[StageSpec]:
    """The training of a teacher; empty if there is none or it is stored already."""
    if not isinstance(teacher, TeacherConfig):
        return []
    return [teacher_stage(teacher, seed=seed, name=name)]


def teacher_stage(teacher: TeacherConfig, *, seed: int, name: str = TEACHER) -> StageSpec:
    """The training of a teacher by one worker.

    Raises:
        ConfigError: its data is missing, or has fewer classes than two.
        DataError: its data is damaged.
    """
    rows = load_rows(RowsSpec(data=teacher.data))
    return StageSpec(
        name=name,
        seed=seed,
        model=NewNetwork(network=teacher.network, num_classes=rows.num_classes),
        objective=SupervisedSpec(),
        image_shape=rows.image_shape,
        labelled=RowsSpec(data=teacher.data),
        views=teacher.data.views,
        steps=teacher.training.steps,
        batch_size=teacher.training.batch_size,
        lanes=1,
        optimizer=teacher.training.optimizer,
        engine=EngineConfig(zero_stage=0),
        checkpoints=CheckpointConfig(),
    )
