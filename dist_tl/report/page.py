"""HTML report of a run that compares arms: one self-contained file that opens offline.

The output is deterministic: the same input gives the same bytes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from dist_tl.report import plots
from dist_tl.report.figures import figures, text_columns
from dist_tl.report.gallery import Gallery, pseudo_tiles, target_tiles
from dist_tl.report.results import ComparisonResults, RunRecord, StageRecord
from dist_tl.report.summary import MARKS_EXPLAINED, ordered, points, table_rows, verdict
from dist_tl.report.svg import Plot, responsive


@dataclass(frozen=True)
class Fact:
    """A named value with an optional explanation."""

    name: str
    value: str
    meaning: str = ""


def build_page(
    results: ComparisonResults,
    *,
    metrics: Mapping[str, Sequence[Mapping[str, Any]]],
    gallery: Gallery | None,
) -> str:
    """Returns the report as HTML.

    Args:
        results: results of the run.
        metrics: metric rows by stage name; rows with `step` and `loss` become curves.
        gallery: images to show, or None.
    """
    groups = plots.group_curves(metrics)
    header, *rows = table_rows(results)
    num_arms = sum(not summary.reference for summary in results.summaries)
    return render(
        "page.html",
        results=results,
        verdict=verdict(results),
        header=header,
        arm_rows=rows[:num_arms],
        reference_rows=rows[num_arms:],
        has_intervals=any(s.accuracy.half_width is not None for s in results.summaries),
        marks_explained=MARKS_EXPLAINED,
        accuracy=_accuracy_plot(results),
        losses=_loss_plot(groups),
        panels_left_out=max(0, len(groups) - plots.MAX_PANELS),
        figures=figures(results.charts, results.heat_maps),
        text_columns=text_columns(results.tables),
        tiles_title=gallery.title if gallery else "",
        pseudo_tiles=pseudo_tiles(gallery) if gallery else [],
        target_tiles=target_tiles(gallery) if gallery else [],
        timeline=timeline_plot(results.stages),
        kinds=[kind for kind in plots.KINDS if any(s.kind == kind for s in results.stages)],
        stage_rows=_stage_rows(results),
        quality=_quality_facts(results),
        shards=_shard_facts(results),
        run_facts=run_facts(results),
    )


def render(template: str, **values: Any) -> str:
    """Renders one of the HTML templates of this package."""
    environment = Environment(
        loader=PackageLoader("dist_tl", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _accuracy_plot(results: ComparisonResults) -> Plot | None:
    if not results.summaries:
        return None
    return responsive(
        lambda width: plots.draw_accuracy(
            ordered(results), results.scores, results.baseline, width=width
        ),
        name="accuracy",
        label="Accuracy of every arm with its 95 % interval; the table above has the numbers.",
    )


def _loss_plot(groups: Mapping[str, Sequence[Mapping[int, float]]]) -> Plot | None:
    if not groups:
        return None
    return responsive(
        lambda width: plots.draw_losses(groups, width=width),
        name="loss",
        label=f"Training loss over optimizer steps of {', '.join(groups)}.",
    )


def timeline_plot(stages: Sequence[StageRecord]) -> Plot | None:
    """Returns a plot of the stages over time, or None if there are no stages."""
    if not stages:
        return None
    return responsive(
        lambda width: plots.draw_timeline(stages, width=width),
        name="timeline",
        label=f"Start and end of each of {len(stages)} stages; the list below has the numbers.",
    )


def _stage_rows(results: ComparisonResults) -> list[tuple[str, ...]]:
    """Returns number, name, kind, start, seconds, steps, samples, starved, overlap; by start."""
    origin = min((stage.started for stage in results.stages), default=0.0)
    return [
        (
            str(number),
            stage.name,
            stage.kind,
            f"{stage.started - origin:,.1f}",
            f"{stage.ended - stage.started:,.1f}",
            _count(stage.figures.get("steps")),
            _count(stage.figures.get("samples")),
            _tenths(stage.figures.get("starved_s")),
            _tenths(results.overlap.get(stage.name)),
        )
        for number, stage in enumerate(plots.by_start(results.stages), 1)
    ]


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _tenths(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _quality_facts(results: ComparisonResults) -> list[Fact]:
    quality = results.quality
    if quality is None:
        return []
    facts = [
        Fact(
            "Agreement",
            f"{points(quality.agreement)} %",
            "samples that the source classifier assigns to the requested class",
        )
    ]
    if quality.frechet is not None:
        meaning = "to real source images, in the source classifier's features"
        facts.append(Fact("Fréchet distance", f"{quality.frechet:,.2f}", meaning))
    if quality.frechet_real is not None:
        meaning = "between two halves of the real images: the lower limit"
        facts.append(Fact("Fréchet distance, real", f"{quality.frechet_real:,.2f}", meaning))
    return [*facts, Fact("Samples evaluated", f"{quality.samples:,}")]


def _shard_facts(results: ComparisonResults) -> list[Fact]:
    """Returns totals of the generated shards and of the data loading; omits missing figures."""
    generating = [stage for stage in results.stages if stage.kind == "generate"]
    facts = []
    if (shards := _total(generating, "shards")) is not None:
        facts.append(Fact("Shards", f"{shards:,.0f}"))
    if (stored := _total(generating, "bytes")) is not None:
        facts.append(Fact("Stored", byte_text(stored)))
    if (samples := _total(generating, "samples")) is not None:
        facts.append(Fact("Pseudo-samples", f"{samples:,.0f}"))
        if seconds := busy_seconds((stage.started, stage.ended) for stage in generating):
            meaning = "while at least one stage was generating"
            facts.append(Fact("Samples per second", f"{samples / seconds:,.1f}", meaning))
    if (starved := _total(results.stages, "starved_s")) is not None:
        meaning = "trainers waiting for data, summed over stages"
        facts.append(Fact("Starved", f"{starved:,.1f} s", meaning))
    if results.overlap:
        meaning = "time from the first step to the commit of the last shard, summed over stages"
        facts.append(Fact("Overlap", f"{sum(results.overlap.values()):,.1f} s", meaning))
    return facts


def _total(stages: Iterable[StageRecord], figure: str) -> float | None:
    values = [stage.figures[figure] for stage in stages if figure in stage.figures]
    return sum(values) if values else None


def busy_seconds(spans: Iterable[tuple[float, float]]) -> float:
    """Returns the total length of the union of (start, end) spans, in seconds."""
    total, covered_until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered_until))
        covered_until = max(covered_until, end)
    return total


def byte_text(size: float) -> str:
    """Returns a size in bytes as text, e.g. "1.5 KiB"."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:,.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def run_facts(results: RunRecord) -> list[Fact]:
    """Returns the facts at the end of every report."""
    return [
        Fact("Wall time", f"{results.wall_seconds:,.1f} s"),
        Fact("Peak memory", byte_text(results.peak_memory_bytes)),
        Fact("Stages", f"{len(results.stages):,}"),
        Fact("Job fingerprint", results.fingerprint),
    ]
