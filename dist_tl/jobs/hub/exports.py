"""Exports of a hub run: models with their cards, and a gallery of test images with their routes."""

import json

import numpy as np
from safetensors.numpy import save as save_arrays

from dist_tl.datasets.images import LabelledImages
from dist_tl.jobs.exports import export_model
from dist_tl.jobs.hub.run import HubOutcome
from dist_tl.jobs.hub.spec import HubArmConfig
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import load_rows

IMAGES_PER_GROUP = 5

LOAD_HUB = "`dist_tl.train.hub_model.load_hub(ObjectStore(FOLDER), '.')` loads it."
LOAD_NETWORK = "`dist_tl.models.files.load_network` loads its two files."


def export(outcome: HubOutcome, store: ObjectStore) -> None:
    """Copies the model of every arm that has one to `models/`, and stores a gallery of routes."""
    for arm in outcome.plan.job.arms:
        for seed in range(outcome.plan.job.seeds):
            stage = f"{arm.name}-seed{seed}"
            if arm.route == "best_single":
                stage = f"single-{outcome.best[seed]}-seed{seed}"
            if stage in outcome.stages:
                _export_arm(outcome, arm, seed, stage, store)
    _write_gallery(outcome, store)


def _export_arm(
    outcome: HubOutcome, arm: HubArmConfig, seed: int, stage: str, store: ObjectStore
) -> None:
    is_hub, target = arm.route == "pathway", outcome.plan.target
    size = len(outcome.plan.job.hub)
    export_model(
        store,
        outcome.stages[stage],
        arm=arm.name,
        seed=seed,
        facts={
            "classes": ", ".join(target.class_names),
            "images (channels, height, width)": (
                f"{tuple(target.image_shape)}, float32 in [-1, 1]"
            ),
        },
        how_to_load=LOAD_HUB if is_hub else LOAD_NETWORK,
        what=f": a hub of {size} experts" if is_hub else ": one network",
    )


def _write_gallery(outcome: HubOutcome, store: ObjectStore) -> None:
    """Store test images of every domain (or class) with the weights of their experts."""
    arms = [a for a in outcome.plan.job.arms if a.route == "pathway" and a.routes.by == "input"]
    if not arms:
        return
    rows = load_rows(outcome.plan.rows(0, "test"))
    if rows.images.shape[3] not in (1, 3):
        return
    # The most selective hub shows most.
    arm = min(arms, key=lambda a: (a.routes.k == 1, a.routes.k))
    answer = outcome.evaluations[arm.name, 0]
    chosen = _examples(rows)
    captions = [_caption(rows, i, answer.predictions[i]) for i in chosen]
    names = {
        "title": f"Test images and the experts that {arm.name} sends them through",
        "subject": "test image seen by",
        "captions": json.dumps(captions),
        "source_classes": json.dumps([expert.name for expert in outcome.plan.job.hub]),
        "target_classes": json.dumps(rows.class_names),
    }
    arrays = {
        "pseudo_images": rows.images[chosen],
        "conditions": np.array([answer.weights[i] for i in chosen], dtype=np.float32),
        "target_images": rows.images[:0],
        "target_labels": rows.labels[:0],
    }
    store.write(layout.GALLERY, save_arrays(arrays, metadata=names))


def _examples(rows: LabelledImages) -> list[int]:
    groups = rows.labels if rows.domains is None else rows.domains
    found = [np.flatnonzero(groups == group)[:IMAGES_PER_GROUP] for group in np.unique(groups)]
    return np.concatenate(found).tolist()


def _caption(rows: LabelledImages, index: int, predicted: int) -> str:
    truth = rows.class_names[rows.labels[index]]
    answer = "right" if predicted == rows.labels[index] else f"called {rows.class_names[predicted]}"
    domain = "" if rows.domains is None else f", {rows.domain_names[rows.domains[index]]}"
    return f"{truth}{domain}: {answer}"
