"""What a predict run found: how many samples were answered, by whom, and how fast."""

from dist_tl.jobs.predict.plan import STAGE
from dist_tl.jobs.predict.run import PredictOutcome
from dist_tl.report.results import Study, Table


def results(outcome: PredictOutcome) -> Study:
    """Counts, rates and expert usage of a finished run."""
    return Study(
        findings=tuple(_findings(outcome)),
        verdict=_verdict(outcome),
        tables=(_usage_table(outcome),),
    )


def _verdict(outcome: PredictOutcome) -> str:
    tally, shards = outcome.tally, outcome.plan.shards.num_shards
    text = f"{tally.samples:,} samples predicted, each exactly once, in {shards} shards"
    if tally.labelled:
        text += f"; {tally.correct / tally.labelled:.1%} of those with labels are right"
    return text + "."


def _findings(outcome: PredictOutcome) -> list[str]:
    found = [f"Predictions: {outcome.plan.job.run}/stages/{STAGE}, one tar and one entry a shard."]
    if outcome.answered:
        size = outcome.plan.shards.samples_per_shard
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
        note=f"k = {outcome.plan.hub.routes.k}: each sample passes through so many experts.",
    )
