"""Runs a layer search: teachers, features, the one-shot set, episodes, the exported model."""

from dataclasses import dataclass

from dist_tl.jobs.layer_search.features import FeaturesOutput, compute_features
from dist_tl.jobs.layer_search.plan import LayerSearchPlan
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.layer_search.tasks import (
    EpisodeScore,
    EpisodesOutput,
    ExportOutput,
    OneShotOutput,
    export_selected,
    find_one_shot_set,
    run_episodes,
)
from dist_tl.jobs.workers import Workers


@dataclass(frozen=True)
class LayerSearchOutcome:
    """Outputs of all tasks.

    Attributes:
        episodes: by number of shots, in order of their index.
        widths: of every layer, the penultimate last.
        one_shot: the set for one label a class; None where there are no held-out classes.
    """

    job: LayerSearchJob
    episodes: dict[int, list[EpisodeScore]]
    widths: tuple[int, ...]
    zeros: int
    one_shot: tuple[int, ...] | None
    exported: ExportOutput | None


def run(plan: LayerSearchPlan, workers: Workers) -> LayerSearchOutcome:
    """Runs every stage and task that has no output yet.

    Raises:
        DistTLError: the named error of a task; finished tasks are kept.
    """
    workers.train_apart("teachers", plan.teachers())
    features = workers.run_tasks("features", compute_features, plan.all_features(), FeaturesOutput)
    one_shot = workers.run_tasks("one-shot set", find_one_shot_set, plan.one_shot(), OneShotOutput)
    layers = one_shot[0].layers if one_shot else None
    tasks = plan.episodes(layers)
    outputs = workers.run_tasks("episodes", run_episodes, tasks, EpisodesOutput)
    exported = workers.run_tasks("export", export_selected, plan.export(), ExportOutput)
    by_shots: dict[int, list[EpisodeScore]] = {shots: [] for shots in plan.job.episodes.shots}
    for task, output in zip(tasks, outputs, strict=True):
        by_shots[task.inputs.shots] += output.episodes
    return LayerSearchOutcome(
        job=plan.job,
        episodes=by_shots,
        widths=features[0].widths,
        zeros=sum(output.zeros for output in features),
        one_shot=layers,
        exported=exported[0] if exported else None,
    )
