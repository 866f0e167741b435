"""What a job will do, from its file and its data alone: nothing is started, nothing is written."""

from collections.abc import Sequence

from dist_tl.config import StrictModel
from dist_tl.jobs.forecast.run import forecast_tasks
from dist_tl.jobs.forecast.spec import ForecastJob
from dist_tl.jobs.geometric_labels.plan import GeometryPlan, Labelling
from dist_tl.jobs.geometric_labels.spec import GeometricLabelsJob
from dist_tl.jobs.hub.cost import HubRow, hub_rows
from dist_tl.jobs.hub.plan import HubPlan
from dist_tl.jobs.hub.spec import HubJob
from dist_tl.jobs.hub.warm_start import WarmPlan, warm_plan
from dist_tl.jobs.job_file import Job
from dist_tl.jobs.layer_search.run import LayerSearchPlan
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.manifold.plan import ManifoldPlan
from dist_tl.jobs.manifold.spec import ManifoldJob
from dist_tl.jobs.predict.run import check_predict
from dist_tl.jobs.predict.spec import PredictJob
from dist_tl.jobs.source.plan import open_assets, planned_facts, source_stages
from dist_tl.jobs.spec import JobConfig, TrainingJobConfig
from dist_tl.jobs.teacher import TeacherConfig, teacher_stage
from dist_tl.jobs.transfer.plan import TransferPlan, check_target
from dist_tl.jobs.transfer.spec import BASELINE, SourceConfig, SourceJob
from dist_tl.methods.pseudo.guard import GuardConfig, num_guard_folds
from dist_tl.models.networks import parameter_count
from dist_tl.shards.drawing import GenerateSpec
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import NewGenerator, NewNetwork, build_model
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageSpec

BYTES_PER_PARAMETER = 12  # float32 weights and Adam's two moments
TAR_OVERHEAD = 3 * 1024  # headers and padding of a sample's three members


class TrainRow(StrictModel):
    """One training stage."""

    stage: str
    objective: str
    steps: int
    rows_per_step: int
    parameters: int | None
    checkpoint_bytes: int | None


class GenerateRow(StrictModel):
    """One stage of pseudo samples."""

    stage: str
    shards: int
    samples: int
    bytes_at_most: int


class TaskRow(StrictModel):
    """Independent tasks of one kind."""

    phase: str
    tasks: int
    what: str


class PlanTable(StrictModel):
    """The whole job."""

    run: str
    store: str
    actors: dict[str, str]
    generate: tuple[GenerateRow, ...]
    train: tuple[TrainRow, ...]
    trials: int
    tasks: tuple[TaskRow, ...] = ()
    hub: tuple[HubRow, ...] = ()


def plan_job(job: Job) -> PlanTable:
    """Check the job against its data and list its stages.

    Raises:
        ConfigError: the job cannot work.
        DataError: its data is damaged.
    """
    if isinstance(job, ManifoldJob):
        return _manifold_table(job)
    if isinstance(job, ForecastJob):
        return _forecast_table(job)
    if isinstance(job, LayerSearchJob):
        return _layer_search_table(job)
    if isinstance(job, GeometricLabelsJob):
        return _geometry_table(job)
    if isinstance(job, HubJob):
        return _hub_table(job)
    if isinstance(job, PredictJob):
        return _predict_table(job)
    if isinstance(job, SourceJob):
        facts = planned_facts(job.source, job.seed)
        stages = source_stages(job, job.source, facts)
        return _table(job, [], stages, trials=0)
    target = check_target(job)
    if isinstance(job.source, SourceConfig):
        facts = planned_facts(job.source, job.seed)
        stages = source_stages(job, job.source, facts)
    else:
        facts, stages = open_assets(ObjectStore(job.run), job.source), []
    plan = TransferPlan(job, facts, target)
    plan.check()
    if any(arm.route == "real_source" for arm in job.arms):
        stages += [plan.real_source_trunk(repeat) for repeat in plan.seeds]
    return _table(
        job,
        plan.generate_stages(),
        [*stages, *plan.training_stages()],
        trials=num_trials(plan),
    )


def _manifold_table(job: ManifoldJob) -> PlanTable:
    plan = ManifoldPlan(job)
    points = len(job.samples) * len(job.lambdas)
    rows = (
        ("sources", plan.sources(), f"{job.source_samples} samples, {job.hidden} hidden units"),
        ("moments", plan.moments(), f"{job.moment_samples} samples a cell"),
        ("baselines", plan.baselines(), f"{points} points, {job.draws} draws each"),
        ("cells", plan.cells(), f"{points} points, {job.draws} draws each"),
    )
    found = (TaskRow(phase=name, tasks=len(tasks), what=what) for name, tasks, what in rows)
    return _tasks_table(job, tuple(found))


def _forecast_table(job: ForecastJob) -> PlanTable:
    what = f"{len(job.sizes)} sizes, {len(job.lambdas)} penalties, {job.labelled} labels"
    rows = (TaskRow(phase="feature maps", tasks=len(forecast_tasks(job)), what=what),)
    trained = isinstance(job.teacher, TeacherConfig)
    stages = [teacher_stage(job.teacher, seed=job.seed)] if trained else []
    return _tasks_table(job, rows, stages)


def _layer_search_table(job: LayerSearchJob) -> PlanTable:
    plan = LayerSearchPlan(job)
    rows = (
        ("features", plan.all_features(), f"{job.rows_per_task} images each"),
        ("one-shot set", plan.one_shot(), "search on held-out classes"),
        ("episodes", plan.episodes(None), f"{job.episodes_per_task} episodes each"),
    )
    found = (TaskRow(phase=name, tasks=len(tasks), what=what) for name, tasks, what in rows)
    return _tasks_table(job, tuple(found), plan.teachers())


def _geometry_table(job: GeometricLabelsJob) -> PlanTable:
    plan = GeometryPlan(job)
    features = plan.features("pool", job.pool)
    rows = (
        TaskRow(phase="features", tasks=len(features), what=f"{plan.pool_size} pool images"),
        TaskRow(phase="labels", tasks=len(features), what=f"m = {job.m}, {len(job.arms) - 1} ways"),
    )
    arms = [arm for arm in job.arms if arm != BASELINE]
    trained = isinstance(job.extractor, TeacherConfig)
    stages = [teacher_stage(job.extractor, seed=job.seed)] if trained else []
    # How many classes an arm has is known when the pool is labelled; two stand for them here.
    guesses = [Labelling(arm, plan.pool_size, 2, "", "") for arm in arms]
    stages += [plan.base(guess) for guess in guesses]
    stages += [
        plan.fine_tuning(arm, repeat, rate, base=None if arm == BASELINE else arm)
        for repeat in range(job.seeds)
        for arm in job.arms
        for rate in job.rates
    ]
    return _tasks_table(job, rows, stages)


def _hub_table(job: HubJob) -> PlanTable:
    plan = HubPlan(job, ObjectStore(job.run))
    plan.check()
    warm = warm_plan(plan)
    first = job.hub[0].name
    stages = plan.pretraining()
    for repeat in range(job.seeds):
        stages += warm.starts(repeat) if warm else []
        stages += [*plan.picks(repeat), *plan.singles(repeat)]
        stages += [plan.arm(arm, repeat, best=first) for arm in plan.model_arms()]
    rows = (
        *(_warm_rows(warm) if warm else ()),
        TaskRow(phase="evaluation", tasks=len(plan.evaluations()), what="routes on the test split"),
        TaskRow(phase="timing", tasks=1, what="every arm, one after another"),
    )
    return _tasks_table(job, rows, stages).model_copy(update={"hub": hub_rows(plan)})


def _predict_table(job: PredictJob) -> PlanTable:
    about, plan = check_predict(job, ObjectStore(job.run))
    what = f"{plan.num_samples} samples, {len(about.experts)} experts, k = {about.routes.k}"
    row = TaskRow(phase="predictions", tasks=plan.num_shards, what=what)
    return _tasks_table(job, (row,))


def _warm_rows(warm: WarmPlan) -> tuple[TaskRow, ...]:
    what = "every expert over all labelled images"
    return (
        TaskRow(phase="cached features", tasks=len(warm.features()), what=what),
        TaskRow(phase="cached rows", tasks=len(warm.cached_rows()), what="shards of features"),
    )


def _tasks_table(job: Job, rows: tuple[TaskRow, ...], train: Sequence[StageSpec] = ()) -> PlanTable:
    sizes = _parameters(list(train))
    return PlanTable(
        run=job.run,
        store=job.store,
        actors=_actors(job),
        generate=(),
        train=tuple(_train_row(spec, sizes.get(_model_key(spec))) for spec in train),
        trials=0,
        tasks=rows,
    )


def num_trials(plan: TransferPlan) -> int:
    """Cross-validation runs of all lambda guards."""
    total = 0
    for arm in plan.pseudo_arms():
        loss = plan.p_ssl(arm).loss
        if isinstance(loss.lambda_guard, GuardConfig):
            labels = load_rows(plan.rows(0, "train")).labels
            folds = num_guard_folds(labels, loss.lambda_guard) or 0
            total += folds * len(loss.lambda_guard.candidates(loss.weight)) * len(plan.seeds)
    return total


def _table(
    job: Job,
    generate: list[GenerateSpec],
    train: list[StageSpec],
    *,
    trials: int,
) -> PlanTable:
    sizes = _parameters(train)
    return PlanTable(
        run=job.run,
        store=job.store,
        actors=_actors(job),
        generate=tuple(_generate_row(spec) for spec in generate),
        train=tuple(_train_row(spec, sizes.get(_model_key(spec))) for spec in train),
        trials=trials,
    )


def _actors(job: JobConfig) -> dict[str, str]:
    actors = {}
    if isinstance(job, TrainingJobConfig):
        actors["trainers"] = f"{job.trainers.workers} x {job.trainers.cpus:g} CPU"
        actors["trainers"] += f" + {job.trainers.gpus:g} GPU" if job.trainers.gpus else ""
    for name in ("generators", "experts", "trials"):
        config = getattr(job, name, None)
        if config is not None:
            count = "as CPUs allow" if name == "trials" else f"{config.min} to {config.max}"
            count += " of each" if name == "experts" else ""
            actors[name] = f"{count} x {config.cpus:g} CPU"
            actors[name] += f" + {config.gpus:g} GPU" if config.gpus else ""
    return actors


def _generate_row(spec: GenerateSpec) -> GenerateRow:
    channels, height, width = spec.image_shape
    per_sample = channels * height * width + 4 * spec.num_classes + TAR_OVERHEAD
    return GenerateRow(
        stage=spec.name,
        shards=spec.plan().num_shards,
        samples=spec.num_samples,
        bytes_at_most=spec.num_samples * per_sample,
    )


def _train_row(spec: StageSpec, parameters: int | None) -> TrainRow:
    return TrainRow(
        stage=spec.name,
        objective=spec.objective.kind,
        steps=spec.steps,
        rows_per_step=spec.batch_size + spec.unlabelled_batch_size,
        parameters=parameters,
        checkpoint_bytes=None if parameters is None else parameters * BYTES_PER_PARAMETER,
    )


def _model_key(spec: StageSpec) -> str:
    """Stages with one key train models of one size."""
    return spec.model.model_dump_json()


def _parameters(stages: list[StageSpec]) -> dict[str, int]:
    """Sizes of the models that can be built without an earlier stage's result."""
    fresh = {
        _model_key(spec): spec
        for spec in stages
        if isinstance(spec.model, NewNetwork | NewGenerator)
    }
    store = ObjectStore("memory://plan")  # fresh models read nothing from it
    return {
        key: parameter_count(
            build_model(spec.model, store, image_shape=spec.image_shape, seed=spec.seed)
        )
        for key, spec in fresh.items()
    }
