"""Copies trained models to `models/`, with model cards."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from dist_tl.storage import layout
from dist_tl.storage.model_files import read_all_files, write_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import write_tensors
from dist_tl.train.spec import StageResult

CARD = """# {arm}, seed {seed}

A target model made by dist_tl{what}.

| | |
|---|---|
{rows}

{how}
"""


def export_model(
    store: ObjectStore,
    result: StageResult,
    *,
    arm: str,
    seed: int,
    facts: Mapping[str, object],
    how_to_load: str,
    what: str = "",
) -> None:
    """Copies the model of a training stage to `models/ARM-seedN/` and writes its card.

    Args:
        facts: rows of the card, in addition to accuracy, stage and fingerprint.
    """
    files = read_all_files(store, layout.stage_model_prefix(result.name))
    correct, total = sum(result.correct), len(result.correct)
    rows = {
        "accuracy on the test split": f"{result.accuracy:.1%} ({correct} of {total})",
        "stage": result.name,
        "stage fingerprint (job, data order, seeds)": result.fingerprint,
        **facts,
    }
    card = CARD.format(
        arm=arm,
        seed=seed,
        what=what,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items()),
        how=how_to_load,
    )
    files[layout.MODEL_CARD] = card.encode()
    write_model_files(store, layout.model_prefix(arm, seed), files)


def export_gallery(
    store: ObjectStore, arrays: Mapping[str, NDArray], metadata: Mapping[str, str]
) -> None:
    """Stores the images that the report shows; see `report/gallery.py` for the arrays."""
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
    write_tensors(store, layout.GALLERY, tensors, metadata)
