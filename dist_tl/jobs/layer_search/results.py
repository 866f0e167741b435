"""Summarises a layer search: accuracy by arm, layer and shots; selected layers; gains."""

import math
from collections.abc import Callable, Iterator, Sequence

from dist_tl.jobs.comparisons import percent, percent_points, signed_percent
from dist_tl.jobs.layer_search.run import LayerSearchOutcome
from dist_tl.jobs.layer_search.tasks import EpisodeResult
from dist_tl.report.results import Chart, HeatMap, Interval, Study, Table, error_bars, interval

Value = Callable[[EpisodeResult], float | None]
Gains = dict[str, list[Interval]]  # over the penultimate layer, by arm and shots
PENULTIMATE, ORACLE, SELECTED = "penultimate", "oracle (diagnostic)", "selected"
ALL_LAYERS, RANDOM = "all layers together", "random set of that size"
TRAINED = {"scratch": "trained from scratch", "fine_tuned": "teacher fine-tuned"}


def results(outcome: LayerSearchOutcome) -> Study:
    """Returns accuracies, gains and selected layers, for the terminal and the report."""
    arms = _arms(outcome)
    gains = {
        name: [_gain(e, value, arms[PENULTIMATE]) for e in outcome.episodes.values()]
        for name, value in arms.items()
    }
    return Study(
        findings=tuple(_findings(outcome, arms)),
        verdict=_verdict(outcome, gains),
        tables=_tables(outcome, arms, gains),
        charts=(_layers_chart(outcome), _gain_chart(outcome, gains)),
        heat_maps=(_selection_map(outcome),),
        facts=tuple(_facts(outcome)),
    )


def _arms(outcome: LayerSearchOutcome) -> dict[str, Value]:
    """Maps each arm to the function that reads its accuracy from an episode."""
    arms: dict[str, Value] = {PENULTIMATE: _layer(-1)}
    arms |= {f"layer {layer}": _layer(layer) for layer in range(len(outcome.widths) - 1)}
    arms[ALL_LAYERS] = lambda e: e.scores.all_layers
    arms[RANDOM] = lambda e: e.scores.random
    arms[SELECTED] = lambda e: e.scores.selected
    for arm, name in TRAINED.items():
        if outcome.job.trained is not None and arm in outcome.job.trained.arms:
            arms[name] = lambda e, arm=arm: e.trained.get(arm)
    arms[ORACLE] = lambda e: e.scores.oracle
    return arms


def _layer(layer: int) -> Value:
    return lambda e: e.scores.single[layer]


def _mean(episodes: Sequence[EpisodeResult], value: Value) -> Interval:
    return interval([v for v in map(value, episodes) if v is not None])


def _gain(episodes: Sequence[EpisodeResult], value: Value, baseline: Value) -> Interval:
    """Returns the paired difference over the episodes that measured both."""
    pairs = [(value(episode), baseline(episode)) for episode in episodes]
    return interval([a - b for a, b in pairs if a is not None and b is not None])


def _tables(outcome: LayerSearchOutcome, arms: dict[str, Value], gains: Gains) -> tuple[Table, ...]:
    job, series = outcome.job, outcome.episodes.values()
    note = (
        f"{job.episodes.count} episodes of {job.episodes.ways} classes, {job.episodes.queries} "
        f"queries a class, {job.search.classifier.kind}; means with 95 % intervals over episodes. "
        "The oracle picks by the queries themselves and is inflated: a diagnostic, no result."
    )
    if job.trained is not None:
        note += f" Trained arms: the first {job.trained.episodes} episodes only."
    header = ("features", *(f"K = {shots}" for shots in outcome.episodes))
    accuracy = [(arm, *(percent(_mean(e, value)) for e in series)) for arm, value in arms.items()]
    gain = [(arm, *map(signed_percent, row)) for arm, row in gains.items() if arm != PENULTIMATE]
    return (
        Table(title="Accuracy on queries, %", header=header, rows=tuple(accuracy), note=note),
        Table(
            title="Gain over the penultimate layer, points",
            header=header,
            rows=tuple(gain),
            note="Paired by episode, with 95 % intervals.",
        ),
    )


def _verdict(outcome: LayerSearchOutcome, gains: Gains) -> str:
    parts = []
    for shots, gain in zip(outcome.episodes, gains[SELECTED], strict=True):
        text = f"{signed_percent(gain)} points" if gain.excludes_zero else "nothing beyond noise"
        parts.append(f"K = {shots}: {text}")
    return f"The selected layers against the penultimate one: {', '.join(parts)}."


def _findings(outcome: LayerSearchOutcome, arms: dict[str, Value]) -> Iterator[str]:
    single = [name for name in arms if name.startswith("layer ") or name == PENULTIMATE]
    for shots, episodes in outcome.episodes.items():
        behind = _gain(episodes, arms[ORACLE], arms[SELECTED])
        best = max(single, key=lambda name: _mean(episodes, arms[name]).mean)
        branches = " and ".join(sorted({episode.branch for episode in episodes}))
        adopted = sum(episode.adopted for episode in episodes) / len(episodes)
        yield (
            f"K = {shots}: the selected set is {percent_points(behind.mean)} points behind the "
            f"oracle; the best single layer is {best}; found by {branches}; other than the "
            f"penultimate layer in {100 * adopted:.0f} % of episodes."
        )
        if scratch := arms.get(TRAINED["scratch"]):
            gain = signed_percent(_gain(episodes, arms[SELECTED], scratch))
            yield f"K = {shots}: selected against training from scratch: {gain} points."
    if exported := outcome.exported:
        text = (
            f"Exported for all classes at K = {outcome.job.export_shots}: the teacher with a head "
            f"on layers {_listed(exported.layers)}, {percent_points(exported.accuracy)} % on "
            f"images not used, against {percent_points(exported.teacher_accuracy)} % with the "
            "penultimate layer"
        )
        if exported.fine_tuned is not None:
            text += f"; fine-tuned from there {percent_points(exported.fine_tuned)} %"
        yield text + f" (models/selected-k{outcome.job.export_shots}*)."
    if outcome.one_shot is not None:
        layers = _listed(outcome.one_shot)
        yield f"The set for one label a class, found on held-out classes: layers {layers}."
    if outcome.zeros:
        yield f"{outcome.zeros} feature vectors are zero and carry no information."


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _layers_chart(outcome: LayerSearchOutcome) -> Chart:
    layers, series = range(len(outcome.widths)), []
    for color, (shots, episodes) in enumerate(outcome.episodes.items()):
        means = [_mean(episodes, _layer(layer)) for layer in layers]
        points = error_bars(f"K = {shots}, 95 %", layers, means, color=color)
        line = {"label": f"K = {shots}", "style": "line", "half_width": None}
        series += [points.model_copy(update=line), points]
    return Chart(
        title="Accuracy of single layers",
        x_label=f"layer in depth order; {layers[-1]} is the penultimate one",
        y_label="accuracy, %",
        series=tuple(series),
        note="Each layer alone, means over episodes.",
    )


def _gain_chart(outcome: LayerSearchOutcome, gains: Gains) -> Chart:
    shots, arms = list(outcome.episodes), (SELECTED, ALL_LAYERS, RANDOM)
    series = [error_bars(arm, shots, gains[arm], color=color) for color, arm in enumerate(arms)]
    return Chart(
        title="Gain over the penultimate layer",
        x_label="labels a class, K",
        y_label="gain, points",
        log_x=len(shots) > 1,
        zero_line=True,
        series=tuple(series),
        note="Paired by episode.",
    )


def _selection_map(outcome: LayerSearchOutcome) -> HeatMap:
    layers, rows = range(len(outcome.widths)), []
    for episodes in outcome.episodes.values():
        counts = [sum(layer in e.layers for e in episodes) for layer in layers]
        rows.append(tuple(100 * count / len(episodes) for count in counts))
    return HeatMap(
        title="How often each layer was chosen, % of episodes",
        x_label="layer",
        y_label="labels a class, K",
        x=tuple(map(str, layers)),
        y=tuple(map(str, outcome.episodes)),
        values=tuple(rows),
        signed=False,
        note="A set may hold several layers, so rows may add up to more than 100.",
    )


def _facts(outcome: LayerSearchOutcome) -> Iterator[tuple[str, str]]:
    yield "Layers", f"{len(outcome.widths)}"
    yield "Widths of their vectors", _listed(outcome.widths)
    yield "Search", f"{outcome.job.search.strategy}, cap {outcome.job.search.cap}"
    z = [e.z for episodes in outcome.episodes.values() for e in episodes if e.z]
    if z:
        means = [math.fsum(column) / len(z) for column in zip(*z, strict=True)]
        yield "Mean z by layer", ", ".join(f"{value:.1f}" for value in means)
