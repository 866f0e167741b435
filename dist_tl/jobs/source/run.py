"""Trains a source classifier and a generator; afterwards the source data is not read again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dist_tl.jobs.source.plan import (
    CLASSIFIER,
    PHASE,
    SourceFacts,
    SourcePlan,
    find_source,
    planned_facts,
    source_rows,
    source_stages,
)
from dist_tl.jobs.source.spec import SourceConfig
from dist_tl.jobs.spec import TrainingJobConfig
from dist_tl.jobs.workers import Workers
from dist_tl.methods.pseudo.quality import agreement, feature_moments, frechet_distance
from dist_tl.models.networks import Network
from dist_tl.report.results import GeneratorQuality
from dist_tl.shards.drawing import GenerateSpec, generator_fingerprint
from dist_tl.shards.reader import read_shard
from dist_tl.storage import layout
from dist_tl.storage.model_files import files_fingerprint, read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageResult, StageSpec

JUDGED_SAMPLES = 2000
FEATURE_BATCH = 512
MOMENTS = f"{layout.stage_prefix(PHASE)}/moments.safetensors"


@dataclass(frozen=True)
class SourceOutcome:
    """The trained source."""

    source: SourceFacts


def run(plan: SourcePlan, workers: Workers) -> SourceOutcome:
    """Trains the source, unless an earlier attempt has.

    Raises:
        DistTLError: the named error of a stage; finished stages are kept.
    """
    stored = find_source(workers.store)
    return SourceOutcome(stored or train_source(plan.job, plan.job.source, workers))


def train_source(
    job: TrainingJobConfig,
    source: SourceConfig,
    workers: Workers,
    *,
    references: Sequence[StageSpec] = (),
) -> SourceFacts:
    """Run every stage that reads source data; afterwards nothing does.

    Args:
        references: further stages that read source data, for arms outside the setting.
    """
    facts = planned_facts(source, job.seed)
    results = workers.train([*source_stages(job, source, facts), *references])
    return _close_phase(workers.store, facts, source, job.seed, results[0])


def _close_phase(
    store: ObjectStore, facts: SourceFacts, source: SourceConfig, seed: int, judged: StageResult
) -> SourceFacts:
    """Keep the moments of real features, so that the generator can be judged without the data."""
    classifier = load_classifier(store, layout.stage_model_prefix(CLASSIFIER)).eval()
    kept = _features(classifier, load_rows(source_rows(source, seed, held_out=False)).tensor())
    held_out = _features(classifier, load_rows(source_rows(source, seed, held_out=True)).tensor())
    mean, covariance = feature_moments(kept)
    store.write(MOMENTS, save_tensors({"mean": mean, "covariance": covariance}))
    facts = facts.model_copy(
        update={
            "classifier_fingerprint": files_fingerprint(read_model_files(store, facts.classifier)),
            "generator_fingerprint": generator_fingerprint(store, facts.generator),
            "classifier_accuracy": judged.accuracy,
            "frechet_real": frechet_distance(mean, covariance, *feature_moments(held_out)),
            "num_held_out": len(held_out),
        }
    )
    store.write(layout.result_key(PHASE), facts.model_dump_json().encode())
    return facts


def judge_generator(
    store: ObjectStore, facts: SourceFacts, shards: GenerateSpec
) -> GeneratorQuality:
    """Agreement and Frechet distance of the first pseudo samples that carry class labels.

    The distance uses as many samples as real images were held out, so that it can be read beside
    the distance of those: a mean over few samples is biased upwards, both alike.
    """
    plan = shards.plan()
    samples = []
    for index in range(plan.num_shards):
        samples += read_shard(store, shards.name, index)
        if len(samples) >= JUDGED_SAMPLES:
            break
    samples = samples[:JUDGED_SAMPLES]
    classifier = load_classifier(store, facts.classifier).eval()
    pixels = np.stack([sample.image for sample in samples])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    features = _features(classifier, images)
    with torch.no_grad():
        logits = classifier.head(features.float())
    requested = torch.tensor([sample.label for sample in samples])
    stored = store.read_or_none(MOMENTS)
    distance = None
    if stored is not None and facts.num_held_out:
        moments = load_tensors(stored)
        few = feature_moments(features[: facts.num_held_out])
        distance = frechet_distance(moments["mean"], moments["covariance"], *few)
    return GeneratorQuality(
        agreement=agreement(logits, requested),
        frechet=distance,
        frechet_real=facts.frechet_real,
        samples=len(samples),
    )


@torch.no_grad()
def _features(network: Network, images: Tensor) -> Tensor:
    batches = images.split(FEATURE_BATCH)
    return torch.cat([network.features(batch) for batch in batches])
