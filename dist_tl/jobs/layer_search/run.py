"""Runs a layer search: teachers, features, the one-shot set, episodes, the exported model."""

from dataclasses import dataclass

from dist_tl.jobs.layer_search.plan import LayerSearchPlan
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.layer_search.tasks import (
    EpisodeResult,
    EpisodesOutput,
    ExportOutput,
    FeaturesOutput,
    OneShotOutput,
    compute_features,
    export_selected,
    find_one_shot_set,
    run_episodes,
)
from dist_tl.jobs.workers import Workers
from dist_tl.methods.layer_search.gram import LayerSet


@dataclass(frozen=True)
class LayerSearchOutcome:
    """Outputs of all tasks.

    Attributes:
        episodes: results by number of shots, in order of the episodes' index.
        widths: vector width of every layer, penultimate last.
        zeros: number of zero feature vectors.
        one_shot: layers found on held-out classes; None if there was no such search.
        exported: None if the job exports no model.
    """

    job: LayerSearchJob
    episodes: dict[int, list[EpisodeResult]]
    widths: tuple[int, ...]
    zeros: int
    one_shot: LayerSet | None
    exported: ExportOutput | None


def run(plan: LayerSearchPlan, workers: Workers) -> LayerSearchOutcome:
    """Runs every stage and task that has no output yet.

    Raises:
        DistTLError: the named error of a task; finished tasks are kept.
    """
    workers.train_apart("teachers", plan.teachers())
    features = workers.run_tasks("features", compute_features, plan.features(), FeaturesOutput)
    one_shot = workers.run_tasks("one-shot set", find_one_shot_set, plan.one_shot(), OneShotOutput)
    layers = one_shot[0].layers if one_shot else None
    tasks = plan.episodes(layers)
    outputs = workers.run_tasks("episodes", run_episodes, tasks, EpisodesOutput)
    exported = workers.run_tasks("export", export_selected, plan.export(), ExportOutput)
    episodes: dict[int, list[EpisodeResult]] = {shots: [] for shots in plan.job.episodes.shots}
    for task, output in zip(tasks, outputs, strict=True):
        episodes[task.inputs.shots] += output.episodes
    return LayerSearchOutcome(
        job=plan.job,
        episodes=episodes,
        widths=features[0].widths,
        zeros=sum(output.zeros for output in features),
        one_shot=layers,
        exported=exported[0] if exported else None,
    )
