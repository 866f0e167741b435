"""Ray tasks of a manifold job: functions of task inputs and the store."""

import time
from dataclasses import replace

from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.jobs.manifold.plan import CellInputs, MomentsInputs, moment_parts
from dist_tl.methods.hidden_manifold.gaussian_model import (
    CHUNK,
    random_feature_covariances,
    random_features,
)
from dist_tl.methods.hidden_manifold.measurements import (
    Experiment,
    FeatureMap,
    Measurement,
    measure_readouts,
    measure_students,
    with_mixture,
)
from dist_tl.methods.hidden_manifold.moment_chunks import (
    sum_chunks,
    sums_from_tensors,
    sums_to_tensors,
)
from dist_tl.methods.hidden_manifold.sampling import draw_tasks, sample_chunk
from dist_tl.methods.hidden_manifold.student import draw_student, train_student
from dist_tl.seeds import torch_rng
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import read_tensors, write_tensors

CENTRING_SAMPLES = 20_000


class SourceOutput(StrictModel):
    """Test error of a source network on its own task."""

    error: float
    seconds: float


class MomentsOutput(StrictModel):
    """Duration of a task that stores moment sums."""

    seconds: float


class ErrorsOutput(StrictModel):
    """All measurements of a cell or a baseline."""

    measurements: tuple[Measurement, ...]
    seconds: float


def train_source(inputs: CellInputs, store: ObjectStore) -> SourceOutput:
    """Trains a source network and stores its first layer."""
    began, job, seed = time.monotonic(), inputs.job, inputs.seed
    task = draw_tasks(inputs.cell.model, seed=seed).source
    chunk = sample_chunk(task, job.source_samples, rng=torch_rng(seed, "source samples"))
    rng = torch_rng(seed, "source weights")
    student = draw_student(task.inputs, job.hidden, job.activation, rng=rng)
    rng = torch_rng(seed, "source order")
    student = train_student(student, chunk.x_ND, chunk.y_N, job.source_training, rng=rng)
    write_tensors(store, inputs.weights_key, {"weights": student.weights_KD.contiguous()})
    test = sample_chunk(task, min(job.test_samples, CHUNK), rng=torch_rng(seed, "source test"))
    error = student.error_rate(test.x_ND, test.y_N)
    return SourceOutput(error=error, seconds=time.monotonic() - began)


def sum_moments(inputs: MomentsInputs, store: ObjectStore) -> MomentsOutput:
    """Sums the moments of some chunks; the samples of a chunk depend only on its index."""
    began, job = time.monotonic(), inputs.job
    plain, bins = sum_chunks(
        draw_tasks(inputs.cell.model, seed=inputs.seed).target,
        _source_weights(inputs, store),
        job.activation,
        moment_parts(job)[inputs.part],
        seed=inputs.seed,
        binned=job.mixture and inputs.cell.is_matched and job.activation != "relu",
    )
    write_tensors(store, inputs.sums_keys[inputs.part], sums_to_tensors(plain, bins))
    return MomentsOutput(seconds=time.monotonic() - began)


def measure_cell(inputs: CellInputs, store: ObjectStore) -> ErrorsOutput:
    """Measures transferred features in one cell: simulation, Gaussian theory, mixture theory."""
    began, job, experiment = time.monotonic(), inputs.job, _experiment(inputs)
    weights_KD = _source_weights(inputs, store)
    plain, bins = sums_from_tensors([read_tensors(store, key) for key in inputs.sums_keys])
    centred = job.activation == "relu"
    mean_K = plain.sum_v_K / plain.count if centred else None
    features = FeatureMap(weights_KD, job.activation, mean_K)
    covariances = plain.covariances(centred=centred)
    measurements = measure_readouts("transferred", features, experiment, covariances)
    if bins is not None:
        measurements = with_mixture(measurements, bins, lam=job.reported_lambda, loss=job.loss)
    if "fine_tuned" in job.arms:
        measurements += measure_students("fine_tuned", experiment, weights_KD.float())
    return ErrorsOutput(measurements=tuple(measurements), seconds=time.monotonic() - began)


def measure_baseline(inputs: CellInputs, store: ObjectStore) -> ErrorsOutput:
    """Measures random features and students trained from scratch on one target task."""
    began, job, experiment = time.monotonic(), inputs.job, _experiment(inputs)
    task, rng = experiment.task, torch_rng(inputs.seed, "random features")
    features = FeatureMap(random_features(task.inputs, job.hidden, rng=rng), job.activation)
    covariances = random_feature_covariances(task, features.weights_KD, job.activation)
    if job.activation == "relu":
        x_ND = sample_chunk(task, CENTRING_SAMPLES, rng=torch_rng(inputs.seed, "centring")).x_ND
        features = replace(features, mean_K=features(x_ND).mean(dim=0))
    measurements = measure_readouts("random", features, experiment, covariances)
    if "two_layer" in job.arms:
        measurements += measure_students("two_layer", experiment)
    return ErrorsOutput(measurements=tuple(measurements), seconds=time.monotonic() - began)


def _experiment(inputs: CellInputs) -> Experiment:
    job = inputs.job
    return Experiment(
        task=draw_tasks(inputs.cell.model, seed=inputs.seed).target,
        seed=inputs.seed,
        hidden=job.hidden,
        activation=job.activation,
        sizes=job.samples,
        draws=job.draws,
        test_samples=job.test_samples,
        lams=job.lambdas,
        loss=job.loss,
    )


def _source_weights(inputs: CellInputs, store: ObjectStore) -> Tensor:
    """Returns the first layer W (K, D) of the trained source, float64."""
    return read_tensors(store, inputs.weights_key)["weights"].double()
