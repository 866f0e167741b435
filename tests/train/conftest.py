"""Fixtures: one rank in the test process, and two ranks in processes that the session shares."""

import pytest
import torch
from rank_processes import TwoRanks
from small_hubs import store_experts

from dist_tl.datasets.digits import DigitsConfig
from dist_tl.datasets.views import ViewsConfig
from dist_tl.models.resnet import ResNetConfig
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import EngineConfig, OptimizerConfig
from dist_tl.train.models import NewNetwork
from dist_tl.train.objectives import SupervisedSpec
from dist_tl.train.rows import RowsSpec, SplitSpec
from dist_tl.train.spec import StageSpec


@pytest.fixture(autouse=True)
def one_thread():
    """One torch thread: rounding depends on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory):
    ranks = TwoRanks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(params=[1, 2], ids=["one rank", "two ranks"])
def ranks(request):
    """Runs `function(rank, world_size, *arguments)` on every rank, at world sizes 1 and 2."""
    if request.param == 2:
        return request.getfixturevalue("two_ranks")
    request.getfixturevalue("alone")
    return lambda function, *arguments: [function(0, 1, *arguments)]


@pytest.fixture
def run_url(tmp_path):
    """Returns the URL of a named run that holds the experts."""

    def with_experts(name, *, norm="group"):
        url = str(tmp_path / name)
        store_experts(url, norm=norm)
        return url

    return with_experts


DIGITS = DigitsConfig(classes=(0, 1, 2), limit=90)
SPLIT = SplitSpec(labels_per_class=6, test_fraction=0.5, data_seed=0, draw_seed=0, part="train")


def rows_spec(part):
    return RowsSpec(data=DIGITS, split=SPLIT.model_copy(update={"part": part}))


def small_stage(*, norm="batch", steps=6, every_steps=2, engine=None, **fields):
    fields.setdefault("engine", EngineConfig(**(engine or {})))
    fields.setdefault(
        "model",
        NewNetwork(network=ResNetConfig(width=4, blocks=(1, 1), norm=norm), num_classes=3),
    )
    spec = {
        "name": "scratch-seed0",
        "seed": 11,
        "objective": SupervisedSpec(),
        "image_shape": (1, 8, 8),
        "labelled": rows_spec("train"),
        "views": ViewsConfig(kind="digits"),
        "batch_size": 8,
        "lanes": 4,
        "optimizer": OptimizerConfig(learning_rate=0.01),
        "evaluate": rows_spec("test"),
    }
    checkpoints = CheckpointConfig(every_steps=every_steps)
    return StageSpec(steps=steps, checkpoints=checkpoints, **{**spec, **fields})


@pytest.fixture
def stage_spec():
    """Builds the specification of a stage of six steps on a few digits; accepts other fields."""
    return small_stage


@pytest.fixture
def part_of_digits():
    """Builds the specification of a part of those digits: train, pool or test."""
    return rows_spec
