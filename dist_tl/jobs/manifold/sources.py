"""Ray tasks of a manifold job that others build on: sources, and moments of their features.

Plain functions of what is asked and the store.
"""

import time
from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

import torch
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.methods.hidden_manifold.activations import Activation
from dist_tl.methods.hidden_manifold.gaussian_model import (
    CHUNK,
    chunk_bins,
    chunk_moments,
)
from dist_tl.methods.hidden_manifold.moments import BinSums, MomentSums, Sums
from dist_tl.methods.hidden_manifold.sampling import ManifoldConfig, draw_tasks, sample_chunk
from dist_tl.methods.hidden_manifold.student import TrainingConfig, draw_student, train_student
from dist_tl.seeds import derive_seed, torch_rng
from dist_tl.storage.objects import ObjectStore

AnySums = TypeVar("AnySums", bound=Sums)


class Setting(StrictModel):
    """What all tasks of one instance share."""

    seed: int
    instance: int
    model: ManifoldConfig
    hidden: int
    activation: Activation

    @property
    def instance_seed(self) -> int:
        """What everything random in this instance starts from."""
        return derive_seed(self.seed, "manifold instance", self.instance)


class SourceInputs(StrictModel):
    """Train one source."""

    setting: Setting
    samples: int
    training: TrainingConfig
    test_samples: int
    weights: str = Field(description="Key under which the first layer is stored.")


class SourceOutput(StrictModel):
    """How well the source task was learnt."""

    error: float
    seconds: float


class MomentsInputs(StrictModel):
    """Sums over some chunks of one cell's transferred features."""

    setting: Setting
    source_weights: str
    chunks: tuple[int, ...] = Field(description="Samples of each chunk of this task.")
    first_chunk: int
    binned: bool
    sums: str = Field(description="Key under which the sums are stored.")


class MomentsOutput(StrictModel):
    """A task whose outcome is a file."""

    seconds: float


def train_source(inputs: SourceInputs, store: ObjectStore) -> SourceOutput:
    """Train a source network and store its first layer."""
    began, setting, seed = time.monotonic(), inputs.setting, inputs.setting.instance_seed
    task = draw_tasks(setting.model, seed=seed).source
    chunk = sample_chunk(task, inputs.samples, rng=torch_rng(seed, "source samples"))
    start = draw_student(
        setting.model.inputs,
        setting.hidden,
        setting.activation,
        rng=torch_rng(seed, "source weights"),
    )
    student = train_student(
        start, chunk.x_ND, chunk.y_N, inputs.training, rng=torch_rng(seed, "source order")
    )
    test = sample_chunk(task, min(inputs.test_samples, CHUNK), rng=torch_rng(seed, "source test"))
    store.write(inputs.weights, save_tensors({"weights": student.weights_KD.contiguous()}))
    error = student.error_rate(test.x_ND, test.y_N)
    return SourceOutput(error=error, seconds=time.monotonic() - began)


def sum_moments(inputs: MomentsInputs, store: ObjectStore) -> MomentsOutput:
    """Sum the moments of some chunks; every chunk's samples follow from its index."""
    began, setting, seed = time.monotonic(), inputs.setting, inputs.setting.instance_seed
    task = draw_tasks(setting.model, seed=seed).target
    weights_KD = read_weights(store, inputs.source_weights)
    plain: MomentSums | None = None
    bins: BinSums | None = None
    for offset, num in enumerate(inputs.chunks):
        index = inputs.first_chunk + offset
        args = task, weights_KD, setting.activation, num
        plain = _added(plain, chunk_moments(*args, rng=torch_rng(seed, "moments", index)))
        if inputs.binned:
            bins = _added(bins, chunk_bins(*args, rng=torch_rng(seed, "moments", index)))
    assert plain is not None, "a task is planned with one chunk or more"
    tensors = _to_tensors("plain", plain) | ({} if bins is None else _to_tensors("bins", bins))
    store.write(inputs.sums, save_tensors(tensors))
    return MomentsOutput(seconds=time.monotonic() - began)


def read_weights(store: ObjectStore, key: str) -> Tensor:
    """The first layer W (K, D) of a trained source, float64."""
    return load_tensors(store.read(key))["weights"].double()


def read_sums(store: ObjectStore, keys: Sequence[str]) -> tuple[MomentSums, BinSums | None]:
    """The sums of all moment tasks of a cell, merged in the order of their chunks."""
    parts = [load_tensors(store.read(key)) for key in keys]
    plain = MomentSums.merge([_from_tensors(MomentSums, "plain", part) for part in parts])
    if not any(key.startswith("bins/") for key in parts[0]):
        return plain, None
    return plain, BinSums.merge([_from_tensors(BinSums, "bins", part) for part in parts])


def _added(total: AnySums | None, part: AnySums) -> AnySums:
    return part if total is None else type(part).merge([total, part])


def _to_tensors(prefix: str, sums: MomentSums | BinSums) -> dict[str, Tensor]:
    values = {field.name: getattr(sums, field.name) for field in fields(sums)}
    return {
        f"{prefix}/{name}": v.contiguous() if isinstance(v, Tensor) else torch.tensor(v)
        for name, v in values.items()
    }


def _from_tensors(kind: type[AnySums], prefix: str, tensors: dict[str, Tensor]) -> AnySums:
    values = [tensors[f"{prefix}/{field.name}"] for field in fields(kind)]
    return kind(*(v if v.ndim else v.item() for v in values))
