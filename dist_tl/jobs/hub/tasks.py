"""Ray tasks of a hub job: cache features, evaluate arms, measure their time."""

import time

import torch
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.jobs.hub.plan import EvaluateInputs, FeaturesInputs, HubPlan, RowsInputs, TimeInputs
from dist_tl.jobs.hub.spec import HubArmConfig
from dist_tl.methods.hub.cost import multiply_adds
from dist_tl.methods.hub.counting import hub_multiply_adds
from dist_tl.methods.hub.evaluation import hub_paths, in_batches
from dist_tl.methods.hub.pathway import HubPathway
from dist_tl.methods.pseudo.distillation import MeanTeacher
from dist_tl.models.networks import Network
from dist_tl.shards.sample import PseudoSample
from dist_tl.shards.writer import write_shard
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import read_tensors, write_tensors
from dist_tl.train.hub_model import ExpertSource, load_hub
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import load_rows

TIMED_PASSES = 5


class TaskOutput(StrictModel):
    """Output of every task."""

    seconds: float


class EvaluateOutput(TaskOutput):
    """Predictions and routes, by row of the test split."""

    predictions: tuple[int, ...]
    correct: tuple[bool, ...]
    weights: tuple[tuple[float, ...], ...] = Field(
        default=(), description="Weight of every expert; 0 for experts that did not see the row."
    )
    multiply_adds: float = Field(description="Mean multiply-adds per image.")


class TimeOutput(TaskOutput):
    """Cost of one image, by arm."""

    microseconds: dict[str, float] = Field(
        description="Microseconds per image in batches of 256, fastest of five passes."
    )
    multiply_adds: dict[str, float] = Field(description="Multiply-adds of single networks.")


@torch.no_grad()
def compute_features(inputs: FeaturesInputs, store: ObjectStore) -> TaskOutput:
    """Stores the features that an expert's frozen trunk computes, float32, by set of rows."""
    began = time.monotonic()
    plan = HubPlan(inputs.job, store)
    network = plan.build(inputs.expert).eval()
    tensors = {
        name: in_batches(network.features, load_rows(rows).tensor()).float().contiguous()
        for name, rows in plan.cached_rows().items()
    }
    write_tensors(store, _features_key(inputs.expert), tensors)
    return TaskOutput(seconds=time.monotonic() - began)


def write_rows(inputs: RowsInputs, store: ObjectStore) -> TaskOutput:
    """Writes shards of float32 rows (1, 1, D): flat images, then features of every expert."""
    began = time.monotonic()
    plan = HubPlan(inputs.job, store)
    data, shards = load_rows(plan.cached_rows()[inputs.rows]), plan.shards(inputs.rows)
    features = [read_tensors(store, _features_key(source))[inputs.rows] for source in plan.sources]
    rows_ND = torch.cat([data.tensor().flatten(1), *features], dim=1).numpy()
    for order in map(shards.order, range(shards.num_shards)):
        samples = (
            PseudoSample(number=n, image=rows_ND[n][None, None], label=int(data.labels[n]))
            for n in order.numbers
        )
        write_shard(order, samples, store)
    return TaskOutput(seconds=time.monotonic() - began)


def _features_key(source: ExpertSource) -> str:
    return f"{layout.stage_prefix(f'features-{source.name}')}/features.safetensors"


@torch.no_grad()
def evaluate(inputs: EvaluateInputs, store: ObjectStore) -> EvaluateOutput:
    """Evaluates a hub, or an ensemble by its mean probabilities, on the test split."""
    began = time.monotonic()
    plan = HubPlan(inputs.job, store)
    rows = load_rows(plan.rows(inputs.repeat, "test"))
    model = _load(plan, inputs.arm, inputs.repeat)
    weights: tuple[tuple[float, ...], ...] = ()
    if isinstance(model, HubPathway):
        paths = hub_paths(model, rows.tensor())
        logits, weights = paths.logits_BC, tuple(map(tuple, paths.weight_BM.tolist()))
        usage = (paths.weight_BM > 0).float().mean(dim=0).tolist()
        cost = hub_multiply_adds(model, rows.image_shape, usage)
    else:
        logits = in_batches(model, rows.tensor())
        cost = float(multiply_adds(model, rows.image_shape))
    predictions = logits.argmax(dim=1)
    return EvaluateOutput(
        predictions=tuple(predictions.tolist()),
        correct=tuple((predictions.numpy() == rows.labels).tolist()),
        weights=weights,
        multiply_adds=cost,
        seconds=time.monotonic() - began,
    )


@torch.no_grad()
def measure_time(inputs: TimeInputs, store: ObjectStore) -> TimeOutput:
    """Times every arm: one warm-up pass over the test split, then five timed passes."""
    began = time.monotonic()
    plan = HubPlan(inputs.job, store)
    rows = load_rows(plan.rows(0, "test"))
    microseconds, counted = {}, {}
    for arm in plan.job.arms:
        model = _load(plan, arm, 0, best=inputs.best)
        if isinstance(model, Network):
            counted[arm.name] = float(multiply_adds(model, rows.image_shape))
        times = []
        for _ in range(1 + TIMED_PASSES):
            started = time.perf_counter()
            in_batches(model, rows.tensor())
            times.append(time.perf_counter() - started)
        microseconds[arm.name] = min(times[1:]) / len(rows) * 1e6
    return TimeOutput(
        microseconds=microseconds, multiply_adds=counted, seconds=time.monotonic() - began
    )


def _load(
    plan: HubPlan, arm: HubArmConfig, repeat: int, *, best: str = ""
) -> HubPathway | Network | MeanTeacher:
    """Loads the model of an arm, in evaluation mode."""
    folders = [layout.stage_model_prefix(name) for name in plan.models(arm, repeat, best=best)]
    if arm.route == "pathway":
        return load_hub(plan.store, folders[0])
    networks = [load_classifier(plan.store, folder).eval() for folder in folders]
    return MeanTeacher(networks, temperature=1.0) if arm.route == "ensemble" else networks[0]
