"""Ray tasks of a hub job: what each hub answers and which ways it goes, and what that costs."""

import time
from collections.abc import Callable

import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.datasets.images import LabelledImages
from dist_tl.methods.hub.cost import multiply_adds, routed_multiply_adds
from dist_tl.methods.hub.pathway import HubPathway, Paths
from dist_tl.methods.pseudo.distillation import MeanTeacher
from dist_tl.models.networks import Network
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import load_hub
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import RowsSpec, load_rows

BATCH = 256
REPEATS = 5


class EvaluateInputs(StrictModel):
    """A hub, or the members of an ensemble, on labelled rows."""

    hub: str | None
    members: tuple[str, ...]
    rows: RowsSpec


class EvaluateOutput(StrictModel):
    """What was answered and which ways were taken, row by row."""

    predictions: tuple[int, ...]
    correct: tuple[bool, ...]
    weights: tuple[tuple[float, ...], ...] = Field(
        default=(), description="Of each row, one an expert; 0 where it did not see the row."
    )
    multiply_adds: float = Field(description="Per image, mean over the rows.")
    seconds: float


class TimeInputs(StrictModel):
    """Models to be timed, one after another in one process."""

    models: dict[str, tuple[str, ...]] = Field(description="Arm -> its models; of one arm's, all.")
    hubs: tuple[str, ...] = Field(description="The arms whose model is a hub.")
    rows: RowsSpec


class TimeOutput(StrictModel):
    """What one image costs, by arm."""

    microseconds: dict[str, float] = Field(
        description="In batches of 256: the fastest of several passes."
    )
    multiply_adds: dict[str, float] = Field(description="Of arms that are one network.")
    seconds: float


@torch.no_grad()
def evaluate(inputs: EvaluateInputs, store: ObjectStore) -> EvaluateOutput:
    """Predictions of the stored models; an ensemble answers by its mean probabilities."""
    began = time.monotonic()
    rows = load_rows(inputs.rows)
    if inputs.hub is None:
        members = [load_classifier(store, place).eval() for place in inputs.members]
        logits = _in_batches(MeanTeacher(members, temperature=1.0), rows)
        weights: list[list[float]] = []
        cost = float(sum(multiply_adds(member, rows.image_shape) for member in members))
    else:
        hub = load_hub(store, inputs.hub)
        parts = [Paths(*hub(images, detailed=True)) for images in _batches(rows)]
        logits = torch.cat([part.logits_BC for part in parts])
        weights_NM = torch.cat([part.weight_BM for part in parts])
        weights = weights_NM.tolist()
        usage = (weights_NM > 0).float().mean(dim=0).tolist()
        cost = hub_multiply_adds(hub, rows.image_shape, usage)
    predictions = logits.argmax(dim=1).tolist()
    return EvaluateOutput(
        predictions=predictions,
        correct=[p == label for p, label in zip(predictions, rows.labels.tolist(), strict=True)],
        weights=weights,
        multiply_adds=cost,
        seconds=time.monotonic() - began,
    )


def hub_multiply_adds(
    hub: HubPathway, image_shape: tuple[int, int, int], usage: list[float]
) -> float:
    """Multiply-adds of one image through a hub whose experts are used so often."""
    router = multiply_adds(hub.router, image_shape) if isinstance(hub.router, Network) else 0
    experts = [multiply_adds(expert, image_shape) for expert in hub.experts.values()]
    return routed_multiply_adds(router, experts, usage, hub.num_classes)


@torch.no_grad()
def measure_time(inputs: TimeInputs, store: ObjectStore) -> TimeOutput:
    """One warm-up pass and five timed ones for every arm."""
    began = time.monotonic()
    rows = load_rows(inputs.rows)
    found, counted = {}, {}
    for arm, places in inputs.models.items():
        model: Callable[[Tensor], Tensor]
        if arm in inputs.hubs:
            model = load_hub(store, places[0])
        else:
            networks = [load_classifier(store, place).eval() for place in places]
            model = networks[0] if len(networks) == 1 else MeanTeacher(networks, temperature=1.0)
            if len(networks) == 1:
                counted[arm] = float(multiply_adds(networks[0], rows.image_shape))
        times = [_seconds(model, rows) for _ in range(REPEATS + 1)]
        found[arm] = min(times[1:]) / len(rows) * 1e6
    return TimeOutput(microseconds=found, multiply_adds=counted, seconds=time.monotonic() - began)


def _seconds(model: Callable[[Tensor], Tensor], rows: LabelledImages) -> float:
    began = time.perf_counter()
    _in_batches(model, rows)
    return time.perf_counter() - began


def _batches(rows: LabelledImages) -> list[Tensor]:
    return list(rows.tensor().split(BATCH))


def _in_batches(model: Callable[[Tensor], Tensor], rows: LabelledImages) -> Tensor:
    return torch.cat([model(images) for images in _batches(rows)])
