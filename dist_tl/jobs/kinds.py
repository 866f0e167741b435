"""Every kind of job, declared once: its folder, its specification, and whether it exports models.

A folder has the same file names as its siblings: `spec.py` (what a job file can say), `plan.py`
(stages and tasks), `tasks.py` (Ray tasks), `run.py`, `results.py` and `exports.py`. They are
imported on first use, so reading this table and a job file imports neither ray nor deepspeed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dist_tl.errors import ConfigError

if TYPE_CHECKING:
    from dist_tl.jobs.plan import Plan
    from dist_tl.jobs.spec import JobConfig
    from dist_tl.jobs.workers import Workers
    from dist_tl.report.results import Comparison, Study
    from dist_tl.storage.objects import ObjectStore


def _exports_nothing(outcome: object, store: "ObjectStore") -> None:
    pass


@dataclass(frozen=True)
class JobKind:
    """The functions behind one kind of job.

    Attributes:
        summary: one line for `--help`.
        spec: returns the model of its job files.
        plan: checks a job against its data and returns its stages and tasks; starts nothing.
        run: runs a plan and returns its outcome; finished stages and tasks are not repeated.
        results: summarises an outcome.
        export: copies the models of an outcome to `models/`, with model cards.
    """

    summary: str
    spec: Callable[[], "type[JobConfig]"]
    plan: "Callable[[Any, ObjectStore], Plan]"
    run: "Callable[[Any, Workers], Any]"
    results: "Callable[[Any], Comparison | Study]"
    export: "Callable[[Any, ObjectStore], None]" = _exports_nothing


def _in_folder(folder: str, spec: str, summary: str, *, exports: bool = False) -> JobKind:
    def load(module: str, name: str) -> Any:
        return getattr(import_module(f"dist_tl.jobs.{folder}.{module}"), name)

    def later(module: str, name: str) -> Callable[..., Any]:
        return lambda *arguments: load(module, name)(*arguments)

    return JobKind(
        summary=summary,
        spec=lambda: load("spec", spec),
        plan=later("plan", "plan"),
        run=later("run", "run"),
        results=later("results", "results"),
        export=later("exports", "export") if exports else _exports_nothing,
    )


KINDS: dict[str, JobKind] = {
    "transfer": _in_folder(
        "transfer",
        "TransferJob",
        "pseudo pre-training and P-SSL against their baselines, without source data",
        exports=True,
    ),
    "hub": _in_folder("hub", "HubJob", "few experts of a hub, chosen for each input", exports=True),
    "predict": _in_folder("predict", "PredictJob", "predictions of a stored hub at any scale"),
    "layer_search": _in_folder(
        "layer_search", "LayerSearchJob", "the best feature maps of a teacher, from few labels"
    ),
    "geometric_labels": _in_folder(
        "geometric_labels", "GeometricLabelsJob", "pseudo-labels by geometry, against others"
    ),
    "manifold": _in_folder(
        "manifold", "ManifoldJob", "transfer between tasks whose relation is known, with theory"
    ),
    "forecast": _in_folder(
        "forecast", "ForecastJob", "labelled data that each feature map would need"
    ),
    "source": _in_folder(
        "source", "SourceJob", "train a source classifier and a conditional generator"
    ),
}


def kind_named(name: object, *, source: str) -> JobKind:
    """The kind that a job names.

    Raises:
        ConfigError: there is no such kind; `source` is named as the place.
    """
    if not isinstance(name, str) or name not in KINDS:
        raise ConfigError(f"{source}: kind: expected one of {', '.join(KINDS)}, got {name!r}")
    return KINDS[name]
