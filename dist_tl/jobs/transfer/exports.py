"""Exports of a transfer run: models with their cards, and a gallery of images."""

import json

import numpy as np
from safetensors.numpy import save as save_arrays

from dist_tl.jobs.exports import export_model
from dist_tl.jobs.transfer.run import TransferOutcome
from dist_tl.shards.drawing import GenerateSpec
from dist_tl.shards.reader import read_shard
from dist_tl.shards.sample import PseudoSample
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import load_rows

GALLERY_IMAGES = 24

HOW_TO_LOAD = """`model.safetensors` and `config.json` are all that is needed to load it:
`dist_tl.models.files.load_network({name: open(name, "rb").read() for name in FILES})`."""


def export(outcome: TransferOutcome, store: ObjectStore) -> None:
    """Copies the final model of every arm and seed to `models/`, and stores a gallery."""
    for (arm, seed), stage in outcome.final.items():
        result = outcome.stages[stage]
        facts = {
            "classes": ", ".join(outcome.plan.target.class_names),
            "generator fingerprint": outcome.plan.source.generator_fingerprint,
            "images (channels, height, width)": (
                f"{tuple(outcome.plan.target.image_shape)}, float32 in [-1, 1]"
            ),
            "optimizer steps of the last stage": result.steps,
        }
        export_model(store, result, arm=arm, seed=seed, facts=facts, how_to_load=HOW_TO_LOAD)
    _write_gallery(outcome, store)


def _write_gallery(outcome: TransferOutcome, store: ObjectStore) -> None:
    """Stores a few pseudo samples with their conditions, and labelled target images."""
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
