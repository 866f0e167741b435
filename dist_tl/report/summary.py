"""Verdict and tables of results, shared by the terminal, Markdown and the HTML report.

Accuracies are in percent, gains in percentage points; gains are paired by seed.
"""

from collections.abc import Sequence

from dist_tl.report.results import (
    AnyResults,
    ArmSummary,
    ComparisonResults,
    Interval,
    StudyResults,
    Table,
)

BETTER, WORSE = "▲", "▼"
MARKS_EXPLAINED = (
    f"{BETTER} above and {WORSE} below the baseline: the 95 % interval of the paired gain excludes "
    "zero. Intervals are Student t over seeds, not corrected for the number of arms."
)


def ordered(results: ComparisonResults) -> list[ArmSummary]:
    """Returns the arms in the order of the job, reference arms last."""
    return sorted(results.summaries, key=lambda summary: summary.reference)


def table_rows(results: ComparisonResults) -> list[tuple[str, ...]]:
    """Returns the results table as text: the header, then one row per arm, reference arms last.

    The note column is present only if an arm has a note.
    """
    arms = ordered(results)
    header = ("arm", "accuracy %", f"gain over {results.baseline}", "seconds", "samples", "note")
    rows = [header, *(_row(summary, results.baseline) for summary in arms)]
    width = len(header) if any(summary.note for summary in arms) else len(header) - 1
    return [row[:width] for row in rows]


def _row(summary: ArmSummary, baseline: str) -> tuple[str, ...]:
    return (
        f"{summary.arm} (reference)" if summary.reference else summary.arm,
        with_half_width(summary.accuracy),
        "baseline" if summary.arm == baseline else gain_text(summary.gain),
        f"{summary.seconds:,.1f}" if summary.seconds < 100 else f"{summary.seconds:,.0f}",
        f"{summary.samples:,.0f}",
        summary.note,
    )


def with_half_width(share: Interval, sign: str = "") -> str:
    """Formats a fraction in percent, e.g. "91.2 ± 1.3"; without "±" for a single seed."""
    mean = points(share.mean, sign)
    return mean if share.half_width is None else f"{mean} ± {points(share.half_width)}"


def gain_text(gain: Interval | None) -> str:
    """Formats a gain in percentage points, with a mark if its interval excludes zero."""
    if gain is None:
        return "-"
    mark = (BETTER if gain.mean > 0 else WORSE) if gain.excludes_zero else ""
    return f"{with_half_width(gain, '+')} {mark}".strip()


def points(share: float, sign: str = "") -> str:
    """Formats `share` times 100 with one decimal; never "-0.0"."""
    value = round(100 * share, 1)
    return f"{value or 0.0:{sign if value else ''}.1f}"


def verdict(results: AnyResults) -> str:
    """Returns the outcome of a run in one sentence."""
    return results.verdict if isinstance(results, StudyResults) else _winner(results)


def _winner(results: ComparisonResults) -> str:
    """Returns which arm beat the baseline and by how much, or that none did.

    Reference arms never win: they use data that the setting does not allow.
    """
    base = next((s for s in results.summaries if s.arm == results.baseline), None)
    if base is None:
        return f"No verdict: the baseline {results.baseline} was not scored."
    candidates = [(s.arm, s.gain) for s in results.summaries if s.gain and not s.reference]
    base_score = f"{points(base.accuracy.mean)} %"
    if not candidates:
        return f"Nothing to compare: only the baseline {base.arm} was run ({base_score})."
    top, top_gain = max(candidates, key=lambda pair: pair[1].mean)
    winners = [(arm, gain) for arm, gain in candidates if gain.excludes_zero and gain.mean > 0]
    if not winners:
        return _no_winner(f"{base.arm} ({base_score})", top, top_gain, len(candidates))
    arm, gain = max(winners, key=lambda pair: pair[1].mean)
    sentence = (
        f"{arm} won: {points(base.accuracy.mean + gain.mean)} % against {base_score} for "
        f"{base.arm}, a gain of {points(gain.mean)} points {_bounds(gain)}"
    )
    if top_gain.mean > gain.mean:
        sentence += (
            f"; {top} was higher on average ({points(top_gain.mean, '+')}), "
            "but its interval includes zero"
        )
    return sentence + "."


def _no_winner(base: str, top: str, gain: Interval, count: int) -> str:
    best = "the only one" if count == 1 else f"the best of {count}"
    if points(gain.mean) == points(0.0):
        return f"No arm beat {base}: {best}, {top}, was equal {_bounds(gain)}."
    size = f"{points(abs(gain.mean))} points {'above' if gain.mean > 0 else 'below'}"
    if gain.mean < 0:
        return f"No arm beat {base}: {best}, {top}, was {size} {_bounds(gain)}."
    if gain.half_width is None:
        return (
            f"One seed cannot show that an arm beats {base}: {best}, {top}, was {size}, which may "
            "be chance."
        )
    return (
        f"No arm beat {base} beyond noise: {best}, {top}, was {size}, and its interval includes "
        f"zero {_bounds(gain)}."
    )


def _bounds(gain: Interval) -> str:
    if gain.half_width is None:
        return "(one seed, no interval)"
    low, high = points(gain.mean - gain.half_width), points(gain.mean + gain.half_width)
    return f"(95 % interval {low} to {high}, {gain.count} seeds)"


def tables(results: AnyResults) -> list[Table]:
    """Returns the tables that the terminal shows."""
    if isinstance(results, StudyResults):
        return list(results.tables)
    header, *rows = table_rows(results)
    title = f"{results.run}: accuracy on the test split"
    return [Table(title=title, header=header, rows=tuple(rows)), *results.tables]


def markdown_tables(results: AnyResults) -> str:
    """Returns all tables as GitHub Markdown, ending in a newline."""
    parts = [_study_markdown(table) for table in results.tables]
    if isinstance(results, ComparisonResults):
        parts.insert(0, markdown_table(results))
    return "\n".join(parts)


def _study_markdown(table: Table) -> str:
    rule = tuple("---" for _ in table.header)
    lines = "".join(_markdown_line(cells) for cells in (table.header, rule, *table.rows))
    return f"**{table.title}**\n\n{lines}"


def markdown_table(results: ComparisonResults) -> str:
    """Returns the results table as GitHub Markdown, ending in a newline."""
    header, *rows = table_rows(results)
    rule = ["---", *["---:"] * 4, *["---"] * (len(header) - 5)]
    return "".join(_markdown_line(cells) for cells in (header, rule, *rows))


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = (" ".join(cell.split()).replace("|", "\\|") for cell in cells)
    return "| " + " | ".join(escaped) + " |\n"
