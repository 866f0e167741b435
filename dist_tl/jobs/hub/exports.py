"""What a finished hub run hands over: models with their cards, and images with their routes."""

import json

import numpy as np
from safetensors.numpy import save as save_arrays

from dist_tl.datasets.images import LabelledImages
from dist_tl.jobs.hub.run import HubOutcome
from dist_tl.jobs.hub.spec import HubArmConfig
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import load_rows

IMAGES_PER_GROUP = 5

CARD = """# {arm}, seed {seed}

A target model made by dist_tl: {what}.

| | |
|---|---|
| accuracy on the test split | {accuracy:.1%} ({correct} of {total}) |
| classes | {classes} |
| stage | {stage} |
| stage fingerprint (job, data order, seeds) | {fingerprint} |
| images (channels, height, width) | {image_shape}, float32 in [-1, 1] |

{how}
"""
HUB = "`dist_tl.train.hub_model.load_hub(ObjectStore(FOLDER), '.')` loads it."
NETWORK = "`dist_tl.models.files.load_network` loads its two files."


def export_hub(outcome: HubOutcome, store: ObjectStore) -> None:
    """Copy the model of every arm that has one, for every seed, to where users look for it."""
    for arm in outcome.plan.job.arms:
        for seed in range(outcome.plan.job.seeds):
            if arm.route == "best_single":
                stage = f"single-{outcome.best[seed]}-seed{seed}"
            else:
                stage = f"{arm.name}-seed{seed}"
            if stage in outcome.stages:
                _export(outcome, arm, seed, stage, store)


def _export(
    outcome: HubOutcome, arm: HubArmConfig, seed: int, stage: str, store: ObjectStore
) -> None:
    source, place = layout.stage_model_prefix(stage), layout.model_prefix(arm.name, seed)
    for key in store.list(source):
        store.write(f"{place}{key.removeprefix(source)}", store.read(key))
    result, is_hub = outcome.stages[stage], arm.route == "pathway"
    card = CARD.format(
        arm=arm.name,
        seed=seed,
        what=f"a hub of {len(outcome.plan.job.hub)} experts" if is_hub else "one network",
        accuracy=result.accuracy,
        correct=sum(result.correct),
        total=len(result.correct),
        classes=", ".join(outcome.plan.target.class_names),
        stage=stage,
        fingerprint=result.fingerprint,
        image_shape=tuple(outcome.plan.target.image_shape),
        how=HUB if is_hub else NETWORK,
    )
    store.write(f"{place}/{layout.MODEL_CARD}", card.encode())


def write_routes_gallery(outcome: HubOutcome, store: ObjectStore) -> None:
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
