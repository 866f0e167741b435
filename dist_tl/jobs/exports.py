"""Copies trained models to `models/`, with model cards."""

from collections.abc import Mapping

from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
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
    source, target = layout.stage_model_prefix(result.name), layout.model_prefix(arm, seed)
    for key in store.list(source):
        store.write(f"{target}{key.removeprefix(source)}", store.read(key))
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
    store.write(f"{target}/{layout.MODEL_CARD}", card.encode())
