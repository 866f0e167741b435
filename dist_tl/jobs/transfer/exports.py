"""What a finished transfer run hands over: models with their cards, and images to look at."""

import json

import numpy as np
from safetensors.numpy import save as save_arrays

from dist_tl.jobs.transfer.run import TransferOutcome
from dist_tl.shards.drawing import GenerateSpec
from dist_tl.shards.reader import read_shard
from dist_tl.shards.sample import PseudoSample
from dist_tl.storage import layout
from dist_tl.storage.model_files import read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageResult

GALLERY_IMAGES = 24

CARD = """# {arm}, seed {seed}

A target model made by dist_tl.

| | |
|---|---|
| accuracy on the test split | {accuracy:.1%} ({correct} of {total}) |
| classes | {classes} |
| stage | {stage} |
| stage fingerprint (job, data order, seeds) | {fingerprint} |
| generator fingerprint | {generator} |
| images (channels, height, width) | {image_shape}, float32 in [-1, 1] |
| optimizer steps of the last stage | {steps} |

`model.safetensors` and `config.json` are all that is needed to load it:
`dist_tl.models.files.load_network({{name: open(name, "rb").read() for name in FILES}})`.
"""


def export_models(outcome: TransferOutcome, store: ObjectStore) -> None:
    """Copy the final model of every arm and seed to where users look for it."""
    for (arm, seed), stage in outcome.final.items():
        place = layout.model_prefix(arm, seed)
        for name, data in read_model_files(store, layout.stage_model_prefix(stage)).items():
            store.write(f"{place}/{name}", data)
        card = _card(outcome, arm, seed, outcome.stages[stage])
        store.write(f"{place}/{layout.MODEL_CARD}", card.encode())


def _card(outcome: TransferOutcome, arm: str, seed: int, result: StageResult) -> str:
    return CARD.format(
        arm=arm,
        seed=seed,
        accuracy=result.accuracy,
        correct=sum(result.correct),
        total=len(result.correct),
        classes=", ".join(outcome.plan.target.class_names),
        stage=result.name,
        fingerprint=result.fingerprint,
        generator=outcome.plan.source.generator_fingerprint,
        image_shape=tuple(outcome.plan.target.image_shape),
        steps=result.steps,
    )


def write_gallery(outcome: TransferOutcome, store: ObjectStore) -> None:
    """Store a few pseudo samples with their conditions, and labelled target images beside them."""
    samples = [
        sample
        for stage in _looked_at(outcome)
        for sample in read_shard(store, stage.name, 0)[:GALLERY_IMAGES]
    ]
    if not samples:
        return
    target = load_rows(outcome.plan.rows(0, "train"))
    names = {
        "source_classes": json.dumps(outcome.plan.source.class_names),
        "target_classes": json.dumps(target.class_names),
    }
    arrays = {
        "pseudo_images": np.stack([sample.image for sample in samples]),
        "conditions": np.stack([_condition(outcome, sample) for sample in samples]),
        "target_images": target.images[:GALLERY_IMAGES],
        "target_labels": target.labels[:GALLERY_IMAGES],
    }
    store.write(layout.GALLERY, save_arrays(arrays, metadata=names))


def _looked_at(outcome: TransferOutcome) -> list[GenerateSpec]:
    """One stage of each kind of condition, if there is one."""
    kinds = {}
    for spec in outcome.plan.generate_stages():
        kinds.setdefault(spec.draw.kind, spec)
    return list(kinds.values())


def _condition(outcome: TransferOutcome, sample: PseudoSample) -> np.ndarray:
    if sample.soft is not None:
        return sample.soft
    one_hot = np.zeros(outcome.plan.source.num_classes, dtype=np.float32)
    one_hot[sample.label] = 1.0
    return one_hot
