"""results.json of a layer search: accuracy by arm, layer and shots; what was chosen; gains."""

import math
from collections.abc import Callable, Iterator, Sequence

from dist_tl.jobs.layer_search.run import LayerSearchOutcome
from dist_tl.jobs.layer_search.tasks import EpisodeScore
from dist_tl.report.results import Chart, HeatMap, Interval, Series, Study, Table, interval

Value = Callable[[EpisodeScore], float | None]
PENULTIMATE, ORACLE = "penultimate", "oracle (diagnostic)"


def results(outcome: LayerSearchOutcome) -> Study:
    """Accuracies, gains and selected layers, for the terminal and the report."""
    return Study(
        findings=tuple(_findings(outcome)),
        verdict=_verdict(outcome),
        tables=(_accuracy_table(outcome), _gain_table(outcome)),
        charts=(_by_layer(outcome), _gain_chart(outcome)),
        heat_maps=(_chosen(outcome),),
        facts=tuple(_facts(outcome)),
    )


def _arms(outcome: LayerSearchOutcome) -> dict[str, Value]:
    """How to read each arm's accuracy from an episode."""
    depth = len(outcome.widths)
    arms: dict[str, Value] = {PENULTIMATE: lambda e: e.single[-1]}
    for layer in range(depth - 1):
        arms[f"layer {layer}"] = lambda e, layer=layer: e.single[layer]
    arms["all layers together"] = lambda e: e.all_layers
    arms["random set of that size"] = lambda e: e.random
    arms["selected"] = lambda e: e.selected
    if outcome.job.trained is not None:
        if "scratch" in outcome.job.trained.arms:
            arms["trained from scratch"] = lambda e: e.scratch
        if "fine_tuned" in outcome.job.trained.arms:
            arms["teacher fine-tuned"] = lambda e: e.fine_tuned
    arms[ORACLE] = lambda e: e.oracle
    return arms


def _mean(episodes: Sequence[EpisodeScore], value: Value) -> Interval:
    return interval([v for v in map(value, episodes) if v is not None])


def _paired(episodes: Sequence[EpisodeScore], one: Value, other: Value) -> Interval:
    """Difference over the episodes in which both were measured."""
    pairs = [(one(episode), other(episode)) for episode in episodes]
    return interval([a - b for a, b in pairs if a is not None and b is not None])


def _accuracy_table(outcome: LayerSearchOutcome) -> Table:
    rows = [
        (name, *(_share(_mean(episodes, value)) for episodes in outcome.episodes.values()))
        for name, value in _arms(outcome).items()
    ]
    return Table(
        title="Accuracy on queries, %",
        header=("features", *(f"K = {shots}" for shots in outcome.episodes)),
        rows=tuple(rows),
        note=_episodes_note(outcome),
    )


def _episodes_note(outcome: LayerSearchOutcome) -> str:
    job = outcome.job
    note = (
        f"{job.episodes.count} episodes of {job.episodes.ways} classes, {job.episodes.queries} "
        f"queries a class, {job.search.classifier.kind}; means with 95 % intervals over episodes. "
        "The oracle picks by the queries themselves and is inflated: a diagnostic, no result."
    )
    if job.trained is not None:
        note += f" Trained arms: the first {job.trained.episodes} episodes only."
    return note


def _gain_table(outcome: LayerSearchOutcome) -> Table:
    arms = _arms(outcome)
    rows = []
    for name, value in arms.items():
        if name == PENULTIMATE:
            continue
        gains = [
            _paired(episodes, value, arms[PENULTIMATE]) for episodes in outcome.episodes.values()
        ]
        rows.append((name, *(_signed(gain) for gain in gains)))
    return Table(
        title="Gain over the penultimate layer, points",
        header=("features", *(f"K = {shots}" for shots in outcome.episodes)),
        rows=tuple(rows),
        note="Paired by episode, with 95 % intervals.",
    )


def _verdict(outcome: LayerSearchOutcome) -> str:
    arms = _arms(outcome)
    parts = []
    for shots, episodes in outcome.episodes.items():
        gain = _paired(episodes, arms["selected"], arms[PENULTIMATE])
        word = "nothing beyond noise" if not gain.excludes_zero else f"{_signed(gain)} points"
        parts.append(f"K = {shots}: {word}")
    return f"The selected layers against the penultimate one: {', '.join(parts)}."


def _findings(outcome: LayerSearchOutcome) -> Iterator[str]:
    arms = _arms(outcome)
    for shots, episodes in outcome.episodes.items():
        behind = _paired(episodes, arms[ORACLE], arms["selected"])
        best = max(
            (name for name in arms if name.startswith("layer ") or name == PENULTIMATE),
            key=lambda name: _mean(episodes, arms[name]).mean,
        )
        branches = {episode.branch for episode in episodes}
        adopted = sum(episode.adopted for episode in episodes) / len(episodes)
        way = " and ".join(sorted(branches))
        yield (
            f"K = {shots}: the selected set is {_points(behind.mean)} points behind the oracle; "
            f"the best single layer is {best}; found by {way}; other than the penultimate layer in "
            f"{100 * adopted:.0f} % of episodes."
        )
        if "trained from scratch" in arms:
            gain = _paired(episodes, arms["selected"], arms["trained from scratch"])
            yield f"K = {shots}: selected against training from scratch: {_signed(gain)} points."
    yield from _exported(outcome)
    if outcome.one_shot is not None:
        names = ", ".join(str(layer) for layer in outcome.one_shot)
        yield f"The set for one label a class, found on held-out classes: layers {names}."
    if outcome.zeros:
        yield f"{outcome.zeros} feature vectors are zero; nothing can be told from those."


def _exported(outcome: LayerSearchOutcome) -> Iterator[str]:
    found = outcome.exported
    if found is None:
        return
    names = ", ".join(str(layer) for layer in found.layers)
    text = (
        f"Exported for all classes at K = {outcome.job.export_shots}: the teacher with a head on "
        f"layers {names}, {_points(found.accuracy)} % on images not used, against "
        f"{_points(found.teacher_accuracy)} % with the penultimate layer"
    )
    if found.fine_tuned is not None:
        text += f"; fine-tuned from there {_points(found.fine_tuned)} %"
    yield text + f" (models/selected-k{outcome.job.export_shots}*)."


def _by_layer(outcome: LayerSearchOutcome) -> Chart:
    depth = len(outcome.widths)
    series = []
    for color, (shots, episodes) in enumerate(outcome.episodes.items()):
        found = [_mean(episodes, lambda e, layer=layer: e.single[layer]) for layer in range(depth)]
        points = {
            "x": tuple(float(layer) for layer in range(depth)),
            "y": tuple(100 * value.mean for value in found),
            "color": color,
        }
        series.append(Series(label=f"K = {shots}", **points))
        half = tuple(100 * (value.half_width or 0.0) for value in found)
        series.append(Series(label=f"K = {shots}, 95 %", half_width=half, style="points", **points))
    return Chart(
        title="Accuracy of single layers",
        x_label=f"layer in depth order; {depth - 1} is the penultimate one",
        y_label="accuracy, %",
        series=tuple(series),
        note="Each layer alone, means over episodes.",
    )


def _gain_chart(outcome: LayerSearchOutcome) -> Chart:
    arms = _arms(outcome)
    shots = tuple(float(k) for k in outcome.episodes)
    series = []
    for color, name in enumerate(("selected", "all layers together", "random set of that size")):
        gains = [_paired(e, arms[name], arms[PENULTIMATE]) for e in outcome.episodes.values()]
        series.append(
            Series(
                label=name,
                x=shots,
                y=tuple(100 * gain.mean for gain in gains),
                half_width=tuple(100 * (gain.half_width or 0.0) for gain in gains),
                style="points",
                color=color,
            )
        )
    return Chart(
        title="Gain over the penultimate layer",
        x_label="labels a class, K",
        y_label="gain, points",
        log_x=len(shots) > 1,
        zero_line=True,
        series=tuple(series),
        note="Paired by episode.",
    )


def _chosen(outcome: LayerSearchOutcome) -> HeatMap:
    depth = len(outcome.widths)
    rows = []
    for episodes in outcome.episodes.values():
        counts = [sum(layer in e.layers for e in episodes) for layer in range(depth)]
        rows.append(tuple(100 * count / len(episodes) for count in counts))
    return HeatMap(
        title="How often each layer was chosen, % of episodes",
        x_label="layer",
        y_label="labels a class, K",
        x=tuple(f"{layer}" for layer in range(depth)),
        y=tuple(f"{shots}" for shots in outcome.episodes),
        values=tuple(rows),
        signed=False,
        note="A set may hold several layers, so rows may add up to more than 100.",
    )


def _facts(outcome: LayerSearchOutcome) -> Iterator[tuple[str, str]]:
    yield "Layers", f"{len(outcome.widths)}"
    yield "Widths of their vectors", ", ".join(str(width) for width in outcome.widths)
    yield "Search", f"{outcome.job.search.strategy}, cap {outcome.job.search.cap}"
    z = [e.z for episodes in outcome.episodes.values() for e in episodes if e.z]
    if z:
        means = [math.fsum(column) / len(z) for column in zip(*z, strict=True)]
        yield "Mean z by layer", ", ".join(f"{value:.1f}" for value in means)


def _points(value: float) -> str:
    return f"{100 * value:.1f}"


def _share(found: Interval) -> str:
    mean = _points(found.mean)
    return mean if found.half_width is None else f"{mean} ± {_points(found.half_width)}"


def _signed(gain: Interval) -> str:
    mean = f"{100 * gain.mean:+.1f}"
    return mean if gain.half_width is None else f"{mean} ± {_points(gain.half_width)}"
