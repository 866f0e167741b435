"""Trains a source classifier and a generator; afterwards the source data is not read again."""

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
import torch

from dist_tl.jobs.source.plan import PHASE, SourceFacts, SourcePlan, source_rows, source_stages
from dist_tl.jobs.source.spec import SourceAssets, SourceConfig
from dist_tl.jobs.spec import TrainingJobConfig
from dist_tl.jobs.workers import Workers
from dist_tl.methods.pseudo.judging import Moments, judge_samples, real_moments
from dist_tl.report.results import GeneratorQuality
from dist_tl.shards.drawing import GenerateSpec, generator_fingerprint
from dist_tl.shards.reader import read_shard
from dist_tl.shards.sample import dequantise
from dist_tl.storage import layout
from dist_tl.storage.model_files import files_fingerprint, read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import write_record
from dist_tl.storage.tensors import read_tensors, write_tensors
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageSpec

JUDGED_SAMPLES = 2000
MOMENTS = f"{layout.stage_prefix(PHASE)}/moments.safetensors"


def run(plan: SourcePlan, workers: Workers) -> SourceFacts:
    """Trains the source, unless an earlier attempt has."""
    return trained_source(plan.job, plan.job.source, plan.source, workers)


def trained_source(
    job: TrainingJobConfig,
    source: SourceConfig | SourceAssets,
    facts: SourceFacts,
    workers: Workers,
    *,
    references: Sequence[StageSpec] = (),
) -> SourceFacts:
    """The trained source; runs all stages that read source data unless they have finished.

    Args:
        references: further stages that read source data, for reference arms.
    """
    if isinstance(source, SourceAssets):
        return facts
    classifier_result, *_ = workers.train([*source_stages(job, source, facts), *references])
    if facts.classifier_accuracy is not None:  # of an earlier attempt
        return facts
    store = workers.store
    classifier = load_classifier(store, facts.classifier).eval()
    training, held_out = (
        load_rows(source_rows(job, source, held_out=side)).tensor() for side in (False, True)
    )
    moments, frechet_real = real_moments(classifier, training, held_out)
    write_tensors(store, MOMENTS, moments._asdict())
    facts = facts.model_copy(
        update={
            "classifier_fingerprint": files_fingerprint(read_model_files(store, facts.classifier)),
            "generator_fingerprint": generator_fingerprint(store, facts.generator),
            "classifier_accuracy": classifier_result.accuracy,
            "frechet_real": frechet_real,
            "num_held_out": len(held_out),
        }
    )
    write_record(store, layout.result_key(PHASE), facts)
    return facts


def _real_moments(store: ObjectStore, facts: SourceFacts) -> Moments | None:
    return None if facts.frechet_real is None else Moments(**read_tensors(store, MOMENTS))


def judge_generator(store: ObjectStore, facts: SourceFacts, spec: GenerateSpec) -> GeneratorQuality:
    """Agreement and Frechet distance of the first samples of a stage that stores class labels."""
    shards = (read_shard(store, spec.name, index) for index in range(spec.plan().num_shards))
    samples = list(islice(chain.from_iterable(shards), JUDGED_SAMPLES))
    share, distance = judge_samples(
        load_classifier(store, facts.classifier).eval(),
        dequantise(torch.from_numpy(np.stack([sample.image for sample in samples]))),
        torch.tensor([sample.label for sample in samples]),
        real=_real_moments(store, facts),
        num_held_out=facts.num_held_out,
    )
    return GeneratorQuality(
        agreement=share, frechet=distance, frechet_real=facts.frechet_real, samples=len(samples)
    )
