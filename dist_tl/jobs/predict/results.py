"""What a predict run found: how many samples were answered, by whom, and how fast."""

from dist_tl.jobs.predict.run import STAGE, PredictOutcome
from dist_tl.jobs.versions import versions
from dist_tl.report.results import StudyResults, Table


def predict_results(
    outcome: PredictOutcome, *, run: str, fingerprint: str, wall_seconds: float
) -> StudyResults:
    """results.json of a finished run."""
    return StudyResults(
        run=run,
        kind="predict",
        fingerprint=fingerprint,
        stages=outcome.stages,
        findings=tuple(_findings(outcome)),
        versions=versions(),
        wall_seconds=wall_seconds,
        peak_memory_bytes=outcome.peak_memory_bytes,
        verdict=_verdict(outcome),
        tables=(_usage_table(outcome),),
    )


def _verdict(outcome: PredictOutcome) -> str:
    tally = outcome.tally
    text = f"{tally.samples:,} samples are answered, each once, in {outcome.plan.num_shards} shards"
    if tally.labelled:
        text += f"; {tally.correct / tally.labelled:.1%} of those with labels are right"
    return text + "."


def _findings(outcome: PredictOutcome) -> list[str]:
    found = [f"Predictions: {outcome.job.run}/stages/{STAGE}, one tar and one entry a shard."]
    if outcome.answered:
        size = outcome.plan.samples_per_shard
        rate = min(outcome.answered * size, outcome.tally.samples) / max(outcome.seconds, 1e-9)
        found.append(
            f"This start answered {outcome.answered} shards in {outcome.seconds:.1f} s with the "
            f"start of the actors, about {rate:,.0f} samples a second."
        )
    if outcome.lost:
        found.append(
            f"Experts {', '.join(outcome.lost)} stayed away and were left out: "
            f"{outcome.tally.rerouted:,} samples missed one that they chose, and are marked "
            '"rerouted".'
        )
    return found


def _usage_table(outcome: PredictOutcome) -> Table:
    samples = outcome.tally.samples
    rows = []
    for replicas in outcome.replicas:
        used = outcome.tally.used.get(replicas.name, 0)
        rows.append((replicas.name, f"{used:,}", f"{used / samples:.1%}", str(replicas.most)))
    return Table(
        title="Which experts answered",
        header=("expert", "samples", "share of all", "replicas at most"),
        rows=tuple(rows),
        note=f"k = {outcome.about.routes.k}: each sample passes through so many experts.",
    )
