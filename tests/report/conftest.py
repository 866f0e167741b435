"""Synthetic results, metrics and images for the tests of reports."""

import numpy as np
import pytest

from dist_tl.report.gallery import Gallery
from dist_tl.report.results import (
    ComparisonResults,
    GeneratorQuality,
    Score,
    StageRecord,
    summarise,
)

START = 1_700_000_000.0
JITTER = (0.0, 0.012, -0.007, 0.004, -0.011)  # seed effects shared by all arms
ARMS = {"scratch": 0.86, "pp": 0.865, "p_ssl": 0.91, "distillation": 0.80, "finetune": 0.95}


def _score(arm, number, seed, accuracy):
    own = 0.003 * ((3 * number + 2 * seed) % 5 - 2)
    accuracy = round(min(1.0, accuracy + JITTER[seed] + own), 3)
    return Score(
        arm=arm,
        seed=seed,
        accuracy=accuracy,
        correct=round(1000 * accuracy),
        total=1000,
        seconds=40.0 + number,
        samples=12_000,
    )


def _stages(arms, seeds):
    for number, arm in enumerate(arms):
        for seed in range(seeds):
            start = START + 20 * (number * seeds + seed)
            made = {"shards": 4, "bytes": 3 << 20, "samples": 2048, "last_commit_at": start + 28}
            yield StageRecord(
                name=f"generate-{arm}-seed{seed}",
                kind="generate",
                started=start,
                ended=start + 30,
                figures=made,
            )
            trained = {"steps": 600, "samples": 9600, "starved_s": 0.5, "first_step_at": start + 8}
            yield StageRecord(
                name=f"{arm}-seed{seed}",
                kind="train",
                started=start + 5,
                ended=start + 50,
                figures=trained,
            )


@pytest.fixture
def make_results():
    """Returns ComparisonResults for a mapping of arm to accuracy; `finetune` is a reference."""

    def make(arms=ARMS, *, seeds=5, **changes):
        scores = [
            _score(arm, number, seed, accuracy)
            for number, (arm, accuracy) in enumerate(arms.items())
            for seed in range(seeds)
        ]
        references = ("finetune",)
        fields = {
            "run": "demo",
            "kind": "transfer",
            "fingerprint": "9f8c1d2e3a4b5c6d",
            "baseline": "scratch",
            "references": references,
            "scores": tuple(scores),
            "summaries": summarise(scores, baseline="scratch", references=references),
            "stages": tuple(_stages(arms, seeds)),
            "quality": GeneratorQuality(
                agreement=0.913, frechet=14.2, frechet_real=3.4, samples=2048
            ),
            "overlap": {"pp-seed0": 20.0, "p_ssl-seed0": 22.5},
            "findings": ("Distillation lost to scratch with every seed.",),
            "versions": {"torch": "2.13.0", "ray": "2.60.0"},
            "wall_seconds": 620.0,
            "peak_memory_bytes": 3 << 30,
        }
        return ComparisonResults(**{**fields, **changes})

    return make


@pytest.fixture
def metrics():
    """Metric rows of two arms with three seeds each."""
    return {
        f"{arm}-seed{seed}": [
            {"step": step, "loss": 2.0 / (1 + step / 50) + 0.01 * seed, "time": START + step}
            for step in range(1, 400, 10)
        ]
        for arm in ("scratch", "p_ssl")
        for seed in range(3)
    }


@pytest.fixture
def gallery():
    """Six grey pseudo-samples of three source classes and four colour target samples."""
    rng = np.random.default_rng(0)
    return Gallery(
        pseudo_images=rng.integers(0, 256, (6, 8, 8, 1), dtype=np.uint8),
        conditions=np.tile(np.float32([0.7, 0.297, 0.003]), (6, 1)),
        source_classes=("zero", "one", "two"),
        target_images=rng.integers(0, 256, (4, 12, 12, 3), dtype=np.uint8),
        target_labels=np.array([0, 1, 1, 0]),
        target_classes=("five", "six"),
        captions=tuple(f"sample {i}" for i in range(6)),
    )
