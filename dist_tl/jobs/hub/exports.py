"""Exports the models of a hub run, and a gallery of test images with their routes."""

import json

import numpy as np

from dist_tl.datasets.images import LabelledImages
from dist_tl.jobs.exports import export_gallery, export_model
from dist_tl.jobs.hub.run import HubOutcome
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import load_rows

IMAGES_PER_GROUP = 5
LOAD_HUB = "`dist_tl.train.hub_model.load_hub(ObjectStore(FOLDER), '.')` loads it."
LOAD_NETWORK = "`dist_tl.models.files.load_network` loads its two files."


def export(outcome: HubOutcome, store: ObjectStore) -> None:
    """Copies every arm that is one model to `models/`, and stores a gallery of routes."""
    plan, target = outcome.plan, outcome.plan.target
    shape = f"{tuple(target.image_shape)}, float32 in [-1, 1]"
    for arm in plan.job.arms:
        is_hub = arm.route == "pathway"
        for seed, best in enumerate(outcome.best if arm.route != "ensemble" else ()):
            [stage] = plan.models(arm, seed, best=best)
            export_model(
                store,
                outcome.stages[stage],
                arm=arm.name,
                seed=seed,
                facts={
                    "classes": ", ".join(target.class_names),
                    "images (channels, height, width)": shape,
                },
                how_to_load=LOAD_HUB if is_hub else LOAD_NETWORK,
                what=f": a hub of {len(plan.job.hub)} experts" if is_hub else ": one network",
            )
    _export_gallery(outcome, store)


def _export_gallery(outcome: HubOutcome, store: ObjectStore) -> None:
    """Stores test images of every domain (or class) with the weights of the experts."""
    arms = [arm for arm in outcome.plan.job.pathways() if arm.routes.by == "input"]
    rows = load_rows(outcome.plan.rows(0, "test"))
    if not arms or rows.images.shape[3] not in (1, 3):
        return
    # The smallest k of several experts shows the routes best.
    arm = min(arms, key=lambda arm: (arm.routes.k == 1, arm.routes.k))
    evaluation = outcome.evaluations[arm.name, 0]
    groups = rows.labels if rows.domains is None else rows.domains
    firsts = [np.flatnonzero(groups == group)[:IMAGES_PER_GROUP] for group in np.unique(groups)]
    chosen = np.concatenate(firsts).tolist()
    captions = [_caption(rows, i, evaluation.predictions[i]) for i in chosen]
    metadata = {
        "title": f"Test images and the experts that {arm.name} sends them through",
        "subject": "test image seen by",
        "captions": json.dumps(captions),
        "source_classes": json.dumps([expert.name for expert in outcome.plan.job.hub]),
        "target_classes": json.dumps(rows.class_names),
    }
    arrays = {
        "pseudo_images": rows.images[chosen],
        "conditions": np.array([evaluation.weights[i] for i in chosen], dtype=np.float32),
        "target_images": rows.images[:0],
        "target_labels": rows.labels[:0],
    }
    export_gallery(store, arrays, metadata)


def _caption(rows: LabelledImages, index: int, predicted: int) -> str:
    label = rows.labels[index]
    result = "right" if predicted == label else f"called {rows.class_names[predicted]}"
    domain = "" if rows.domains is None else f", {rows.domain_names[rows.domains[index]]}"
    return f"{rows.class_names[label]}{domain}: {result}"
