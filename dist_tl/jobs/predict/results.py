"""Summarises predictions: number of samples, use of the experts, and speed."""

from collections.abc import Iterator

from dist_tl.jobs.predict.plan import STAGE
from dist_tl.jobs.predict.run import PredictOutcome
from dist_tl.report.results import Study, Table


def results(outcome: PredictOutcome) -> Study:
    """Returns counts, rates and the use of the experts."""
    counts, shards = outcome.counts, outcome.plan.shards.num_shards
    verdict = f"{counts['samples']:,} samples predicted, each exactly once, in {shards} shards"
    if counts["labelled"]:
        accuracy = counts["correct"] / counts["labelled"]
        verdict += f"; {accuracy:.1%} of those with labels are right"
    rows = [
        (
            expert,
            f"{outcome.used[expert]:,}",
            f"{outcome.used[expert] / counts['samples']:.1%}",
            str(most),
        )
        for expert, most in outcome.replicas.items()
    ]
    table = Table(
        title="Use of the experts",
        header=("expert", "samples", "share of all", "replicas at most"),
        rows=tuple(rows),
        note=f"k = {outcome.plan.hub.routes.k}: each sample passes through k experts.",
    )
    return Study(findings=tuple(_findings(outcome)), verdict=f"{verdict}.", tables=(table,))


def _findings(outcome: PredictOutcome) -> Iterator[str]:
    samples, shards = outcome.counts["samples"], outcome.shards
    yield f"Predictions: {outcome.plan.job.run}/stages/{STAGE}, one tar and one entry a shard."
    if shards:
        predicted = min(shards * outcome.plan.shards.samples_per_shard, samples)
        rate = predicted / max(outcome.seconds, 1e-9)
        yield (
            f"This attempt predicted {shards} shards in {outcome.seconds:.1f} s including the "
            f"start of the actors, about {rate:,.0f} samples a second."
        )
    if outcome.lost:
        yield (
            f"Experts {', '.join(outcome.lost)} did not start and were left out: "
            f"{outcome.counts['rerouted']:,} samples missed one that they chose, and are marked "
            '"rerouted".'
        )
