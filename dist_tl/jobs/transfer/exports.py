"""Exports of a transfer run: models with their cards, and a gallery of images."""

import json

import numpy as np

from dist_tl.jobs.exports import export_gallery, export_model
from dist_tl.jobs.transfer.plan import TransferPlan
from dist_tl.jobs.transfer.run import TransferOutcome
from dist_tl.shards.reader import read_shard
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import load_rows

GALLERY_IMAGES = 24
HOW_TO_LOAD = """`model.safetensors` and `config.json` are all that is needed to load it:
`dist_tl.models.files.load_network({name: open(name, "rb").read() for name in FILES})`."""


def export(outcome: TransferOutcome, store: ObjectStore) -> None:
    """Copies the final model of every arm and seed to `models/`, and stores a gallery."""
    source, target = outcome.plan.source, outcome.plan.target
    shape = tuple(target.image_shape)
    for (arm, seed), result in outcome.final.items():
        facts = {
            "classes": ", ".join(target.class_names),
            "generator fingerprint": source.generator_fingerprint,
            "images (channels, height, width)": f"{shape}, float32 in [-1, 1]",
            "optimizer steps of the last stage": result.steps,
        }
        export_model(store, result, arm=arm, seed=seed, facts=facts, how_to_load=HOW_TO_LOAD)
    _write_gallery(outcome.plan, store)


def _write_gallery(plan: TransferPlan, store: ObjectStore) -> None:
    """Stores a few pseudo samples with their conditions, and labelled target images."""
    stages: dict[str, str] = {}  # one for each kind of condition
    for spec in plan.generate_stages():
        stages.setdefault(spec.draw.kind, spec.name)
    shards = [read_shard(store, stage, 0)[:GALLERY_IMAGES] for stage in stages.values()]
    samples = [sample for shard in shards for sample in shard]
    if not samples:
        return
    target = load_rows(plan.rows(0, "train"))
    one_hot = np.eye(plan.source.num_classes, dtype=np.float32)
    conditions = [one_hot[s.label] if s.soft is None else s.soft for s in samples]
    arrays = {
        "pseudo_images": np.stack([sample.image for sample in samples]),
        "conditions": np.stack(conditions),
        "target_images": target.images[:GALLERY_IMAGES],
        "target_labels": target.labels[:GALLERY_IMAGES],
    }
    names = {
        "source_classes": json.dumps(plan.source.class_names),
        "target_classes": json.dumps(target.class_names),
    }
    export_gallery(store, arrays, names)
