"""Results of a run: scores, intervals, stages. Written by jobs, read by reports.

Intervals are two-sided 95 % Student t over seeds; differences between arms are paired by seed,
because two arms of one seed share their labels, their test split and their initial weights.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from scipy import stats

from dist_tl.config import StrictModel
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import parse_record, write_record


class Interval(StrictModel):
    """A mean over seeds with its 95 % confidence interval."""

    mean: float = Field(description="Mean over seeds.")
    half_width: float | None = Field(
        description="Half the width of the 95 % interval; absent with a single seed."
    )
    count: int = Field(ge=1, description="Number of seeds.")

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval; never with a single seed."""
        return self.half_width is not None and abs(self.mean) > self.half_width


def interval(values: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Mean and Student t interval of `values`.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("expected at least one value, got none")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean=mean, half_width=None, count=1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, count - 1))
    return Interval(mean=mean, half_width=quantile * math.sqrt(variance / count), count=count)


class Score(StrictModel):
    """One arm with one seed, on the test split."""

    arm: str
    seed: int
    accuracy: float = Field(ge=0, le=1, description="Share of the test split that is right.")
    correct: int = Field(ge=0)
    total: int = Field(ge=1, description="Test images.")
    seconds: float = Field(ge=0, description="Wall-clock seconds of training, summed over stages.")
    samples: int = Field(ge=0, description="Training images seen, repeats counted.")
    note: str = ""


class ArmSummary(StrictModel):
    """One row of the results table."""

    arm: str
    accuracy: Interval
    gain: Interval | None = Field(description="Paired difference to the baseline arm, if not it.")
    seconds: float = Field(description="Mean wall-clock seconds of training a seed.")
    samples: float = Field(description="Mean training images seen a seed.")
    reference: bool = Field(description="Uses what the user's setting forbids; shown apart.")
    note: str = ""


class StageRecord(StrictModel):
    """When one stage worked, and its figures. Times are Unix seconds."""

    name: str
    kind: str = Field(description='"generate", "train", "trial" or "setup".')
    started: float
    ended: float
    figures: dict[str, float] = Field(
        default_factory=dict,
        description="E.g. shards, bytes, samples, steps, starved_s, first_step_at, last_commit_at.",
    )


class GeneratorQuality(StrictModel):
    """How good the pseudo samples are, judged by the source classifier."""

    agreement: float = Field(
        description="Share of samples that the classifier gives the class they were asked for."
    )
    frechet: float | None = Field(
        description="Frechet distance to real source images in the classifier's features."
    )
    frechet_real: float | None = Field(
        description="The same distance between two halves of the real images: the floor."
    )
    samples: int


class Table(StrictModel):
    """A table as text."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = Field(default="", description="How to read it, in a sentence.")


class Series(StrictModel):
    """One curve: a line, or points with error bars."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    half_width: tuple[float, ...] | None = Field(
        default=None, description="Of each point's error bar."
    )
    band: tuple[tuple[float, float], ...] | None = Field(
        default=None, description="Low and high around each point of a line."
    )
    style: Literal["line", "points"] = "line"
    color: int = Field(default=0, ge=0, description="Series of one colour belong together.")


def error_bars(
    label: str,
    x: Sequence[float],
    intervals: Sequence[Interval],
    *,
    scale: float = 100.0,
    color: int = 0,
) -> Series:
    """Points with their 95 % intervals.

    Args:
        scale: factor on means and half-widths; 100 for shares in per cent.
    """
    single = all(value.half_width is None for value in intervals)
    return Series(
        label=label,
        x=tuple(x),
        y=tuple(scale * value.mean for value in intervals),
        half_width=None if single else tuple(scale * (v.half_width or 0.0) for v in intervals),
        style="points",
        color=color,
    )


class Chart(StrictModel):
    """Curves over one axis."""

    title: str
    x_label: str = Field(description="With its unit.")
    y_label: str = Field(description="With its unit.")
    log_x: bool = False
    zero_line: bool = False
    series: tuple[Series, ...]
    note: str = ""


class HeatMap(StrictModel):
    """A number over two axes; the colours are symmetric around zero where `signed`."""

    title: str
    x_label: str
    y_label: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...] = Field(description="A row for each y.")
    insignificant: tuple[tuple[bool, ...], ...] = Field(
        default=(), description="Cells whose interval includes zero; shown hatched."
    )
    signed: bool = True
    note: str = ""


class Findings(StrictModel):
    """What a run found, whatever its kind."""

    findings: tuple[str, ...] = Field(description="Plain sentences, negative results included.")
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    heat_maps: tuple[HeatMap, ...] = ()


class Comparison(Findings):
    """Findings of a job that compares arms; `tables` stand next to the table of the arms."""

    baseline: str
    references: tuple[str, ...] = ()
    scores: tuple[Score, ...]
    summaries: tuple[ArmSummary, ...]
    quality: GeneratorQuality | None = None
    overlap: dict[str, float] = Field(
        default_factory=dict,
        description="Seconds by which the first optimizer step of a stage came before the last "
        "commit of the shards it reads, by stage name.",
    )


class Study(Findings):
    """Findings of a job that measures: tables, curves, maps, and what they say."""

    verdict: str = Field(description="The outcome in one sentence.")
    facts: tuple[tuple[str, str], ...] = Field(default=(), description="Figures by name.")


class JobRecord(StrictModel):
    """job.json: the resolved job of a run, with its inputs pinned to their contents."""

    job: dict[str, Any]
    fingerprint: str = Field(description="Of the fields that change the results.")
    versions: dict[str, str]


class RunRecord(StrictModel):
    """Which run produced the findings of a results.json, and what it cost."""

    run: str
    kind: str
    fingerprint: str
    stages: tuple[StageRecord, ...]
    versions: dict[str, str]
    wall_seconds: float
    peak_memory_bytes: int
    gallery: bool = Field(default=False, description="Whether the run stored a gallery of images.")


class ComparisonResults(RunRecord, Comparison):
    """results.json of a job that compares arms."""


class StudyResults(RunRecord, Study):
    """results.json of a job that measures."""


AnyResults = ComparisonResults | StudyResults


def results_of(record: RunRecord, findings: Comparison | Study) -> AnyResults:
    """The content of a run's results.json: its record and its findings."""
    model = ComparisonResults if isinstance(findings, Comparison) else StudyResults
    return model(**dict(record), **dict(findings))


def write_results(store: ObjectStore, results: AnyResults) -> None:
    """Stores the results.json of a run."""
    write_record(store, layout.RESULTS, results)


def stored_results(store: ObjectStore) -> AnyResults | None:
    """Returns the results of a run, or None if it is not finished.

    Raises:
        DamagedError: they are not the results that were written.
    """
    data = store.read_or_none(layout.RESULTS)
    if data is None:
        return None
    kind = StudyResults if b'"verdict":' in data else ComparisonResults
    remedy = "`dist-tl run` with the same job makes it again from the finished stages"
    return parse_record(data, layout.RESULTS, kind, remedy=remedy)


def summarise(
    scores: Sequence[Score],
    *,
    baseline: str,
    references: Sequence[str] = (),
    notes: dict[str, str] | None = None,
) -> tuple[ArmSummary, ...]:
    """One summary per arm, in order of first appearance.

    Raises:
        ValueError: the baseline has no scores, or an arm lacks a seed the baseline has.
    """
    by_arm: dict[str, dict[int, Score]] = {}
    for score in scores:
        by_arm.setdefault(score.arm, {})[score.seed] = score
    if baseline not in by_arm:
        raise ValueError(f"expected scores for the baseline {baseline!r}, got {sorted(by_arm)}")
    return tuple(
        _summary(arm, by_seed, by_arm[baseline], baseline, references, (notes or {}).get(arm, ""))
        for arm, by_seed in by_arm.items()
    )


def _summary(
    arm: str,
    by_seed: dict[int, Score],
    base: dict[int, Score],
    baseline: str,
    references: Sequence[str],
    note: str,
) -> ArmSummary:
    if by_seed.keys() != base.keys():
        raise ValueError(f"{arm} has seeds {sorted(by_seed)}, {baseline} has {sorted(base)}")
    rows = list(by_seed.values())
    gains = [score.accuracy - base[seed].accuracy for seed, score in by_seed.items()]
    return ArmSummary(
        arm=arm,
        accuracy=interval([row.accuracy for row in rows]),
        gain=None if arm == baseline else interval(gains),
        seconds=math.fsum(row.seconds for row in rows) / len(rows),
        samples=sum(row.samples for row in rows) / len(rows),
        reference=arm in references,
        note=note,
    )
