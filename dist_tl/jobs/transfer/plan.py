"""Plans a transfer job: every stage, as a pure function of the job and of facts about its data.

Names, seeds and budgets are decided here and nowhere else, so that the plan shown to a user, a run
and a resumed run cannot disagree. Arms of one seed share the labelled images, their order and the
initial weights: their difference is paired.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

from dist_tl.config import fingerprint
from dist_tl.errors import ConfigError
from dist_tl.jobs.plan import PlanTable, plan_table
from dist_tl.jobs.source.plan import (
    SourceFacts,
    find_source,
    forbid_source_data,
    open_assets,
    planned_facts,
    source_stages,
)
from dist_tl.jobs.source.spec import SourceConfig
from dist_tl.jobs.spec import BudgetConfig
from dist_tl.jobs.stages import Part, repeat_seed, target_rows, training_stage
from dist_tl.jobs.transfer.spec import ArmConfig, PPConfig, PSSLArmConfig, TransferJob
from dist_tl.methods.pseudo.guard import GuardConfig, num_guard_folds
from dist_tl.shards.drawing import ByClass, ByTarget, GenerateSpec
from dist_tl.shards.order import ShardPlan, check_sizes
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import ModelSpec, NewNetwork, PretrainedTrunk
from dist_tl.train.objectives import DistillationSpec, ObjectiveSpec, PSSLSpec, SupervisedSpec
from dist_tl.train.rows import FoldSpec, RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

PP_SHARDS = "pp-shards"
# The stage whose trunk a route starts from; other routes start from fresh weights.
TRUNKS = {"pp": "pp-trunk", "pp_p_ssl": "pp-trunk", "real_source": "real_source-trunk"}


@dataclass(frozen=True)
class TargetFacts:
    """What the target data turned out to be."""

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str  # of all its images


def plan(job: TransferJob, store: ObjectStore) -> "TransferPlan":
    """The stages of a job; source data is opened only if it is still needed.

    Raises:
        ConfigError: images, lanes or batches do not fit, or K is larger than a class; names both.
        DataError: data is damaged.
    """
    plan = TransferPlan(job, _source_facts(job, store), _target_facts(job))
    plan.check()
    return plan


def _source_facts(job: TransferJob, store: ObjectStore) -> SourceFacts:
    if not isinstance(job.source, SourceConfig):
        return open_assets(store, job.source)
    return find_source(store) or planned_facts(job.source, job.seed)


def _target_facts(job: TransferJob) -> TargetFacts:
    """Loads the target data in the driver: bad data is refused before any actor starts."""
    load_rows(target_rows(job, job.target, 0, "train"))
    everything = load_rows(RowsSpec(data=job.target.data))
    return TargetFacts(
        image_shape=everything.image_shape,
        num_classes=everything.num_classes,
        class_names=everything.class_names,
        fingerprint=hashlib.sha256(everything.images.tobytes()).hexdigest()[:16],
    )


@dataclass(frozen=True)
class Guard:
    """The cross-validation that chooses the lambda of one arm in one repeat.

    Attributes:
        weights: the lambdas that are compared.
    """

    arm: ArmConfig
    repeat: int
    weights: tuple[float, ...]
    num_folds: int

    def trial(self, weight: float) -> str:
        """The name of the trial of one lambda."""
        return f"{self.arm.name}-seed{self.repeat}-w{weight:g}"


@dataclass(frozen=True)
class TransferPlan:
    """The stages of one job."""

    job: TransferJob
    source: SourceFacts
    target: TargetFacts

    def check(self) -> None:
        """Refuses image shapes, lanes and batches that do not fit, and source data as target data.

        Raises:
            ConfigError: naming both shapes, the nearest sizes that work, or the stage.
        """
        source, target = tuple(self.source.image_shape), tuple(self.target.image_shape)
        if source != target:
            raise ConfigError(
                f"target images are (channels, height, width) {target}, the source's are "
                f"{source}; set target.data.size and target.data.channels to the source's"
            )
        for spec in self.generate_stages():
            check_sizes(
                spec.plan(),
                batch_size=self.read_batch_size(spec),
                world_size=self.job.trainers.workers,
            )
        forbid_source_data(self.training_stages(), self.job.source)

    def table(self) -> PlanTable:
        """All stages, those of the source first, and the guards' trials."""
        return plan_table(
            self.job,
            generate=self.generate_stages(),
            train=[*self.source_stages(), *self.references(), *self.training_stages()],
            trials=sum(guard.num_folds * len(guard.weights) for guard in self.guards()),
        )

    def guards(self) -> list[Guard]:
        """The lambda guards that have enough labels to cross-validate with."""
        guards = []
        for arm in self.pseudo_arms():
            loss = self.p_ssl(arm).loss
            if isinstance(loss.lambda_guard, GuardConfig):
                for repeat in self.seeds:
                    labels = load_rows(self.rows(repeat, "train")).labels
                    if folds := num_guard_folds(labels, loss.lambda_guard):
                        weights = loss.lambda_guard.candidates(loss.weight)
                        guards.append(Guard(arm, repeat, weights, folds))
        return guards

    def source_stages(self) -> list[StageSpec]:
        """The trainings of source classifier and generator; empty if both exist already."""
        if not isinstance(self.job.source, SourceConfig):
            return []
        return source_stages(self.job, self.job.source, self.source)

    def references(self) -> list[StageSpec]:
        """Pre-trainings on the source data itself, for arms outside the setting."""
        if not any(arm.route == "real_source" for arm in self.job.arms):
            return []
        return [self.real_source_trunk(repeat) for repeat in self.seeds]

    @cached_property
    def seeds(self) -> range:
        """The repeats."""
        return range(self.job.seeds)

    def rows(self, repeat: int, part: Part, fold: FoldSpec | None = None) -> RowsSpec:
        """A part of the target data."""
        return target_rows(self.job, self.job.target, repeat, part, fold=fold)

    # Pseudo samples.

    def pp_shards(self) -> GenerateSpec:
        """The samples of pseudo pre-training: one set for all repeats."""
        assert self.job.pp is not None, "the specification requires pp where an arm uses it"
        return self._generate(PP_SHARDS, self.job.seed, self.job.pp.num_samples, ByClass())

    def pseudo_shards(self, arm: ArmConfig, repeat: int) -> GenerateSpec:
        """The samples of P-SSL, conditioned on this repeat's labelled images."""
        config = self.p_ssl(arm)
        # Arms with the job's own settings share their stored samples; how many fresh ones are
        # needed depends on the arm's budget.
        owner = "p_ssl" if arm.p_ssl is None and config.samples else arm.name
        per_step = self.unlabelled_batch_size(arm)
        return self._generate(
            f"{owner}-shards-seed{repeat}",
            repeat_seed(self.job, repeat),
            config.samples or self.budget(arm).steps * per_step,
            ByTarget(condition=config.loss.condition),
            conditions=fingerprint(
                [
                    self.source.classifier_fingerprint,
                    self.target.fingerprint,
                    self.rows(repeat, "train").model_dump(mode="json"),
                    config.loss.condition.temperature,
                ]
            ),
        )

    def read_batch_size(self, spec: GenerateSpec) -> int:
        """The largest global batch that reads a stage of pseudo samples."""
        if spec.name == PP_SHARDS:
            return self.job.pp.training.batch_size if self.job.pp else 1
        return max(self.unlabelled_batch_size(arm) for arm in self.pseudo_arms())

    def _generate(
        self,
        name: str,
        seed: int,
        num_samples: int,
        draw: ByClass | ByTarget,
        *,
        conditions: str = "",
    ) -> GenerateSpec:
        return GenerateSpec(
            name=name,
            seed=seed,
            generator=self.source.generator,
            generator_fingerprint=self.source.generator_fingerprint,
            num_classes=self.source.num_classes,
            image_shape=self.source.image_shape,
            draw=draw,
            conditions_fingerprint=conditions,
            num_samples=num_samples,
            batch_size=self.job.sample_batch_size,
            shards=self.job.packing,
        )

    def generate_stages(self) -> list[GenerateSpec]:
        """All stages of pseudo samples, in the order in which they are wanted."""
        stages = {}
        if any(arm.route in ("pp", "pp_p_ssl") for arm in self.job.arms):
            stages[PP_SHARDS] = self.pp_shards()
        for repeat in self.seeds:
            for arm in self.pseudo_arms():
                spec = self.pseudo_shards(arm, repeat)
                stages[spec.name] = spec
        return list(stages.values())

    # Training.

    def pseudo_arms(self) -> list[ArmConfig]:
        """The arms that learn from pseudo samples beside labelled images."""
        return [arm for arm in self.job.arms if arm.route in ("p_ssl", "pp_p_ssl")]

    def p_ssl(self, arm: ArmConfig) -> PSSLArmConfig:
        """The P-SSL settings of an arm."""
        config = arm.p_ssl or self.job.p_ssl
        assert config is not None, "the specification requires p_ssl where an arm uses it"
        return config

    def budget(self, arm: ArmConfig) -> BudgetConfig:
        """How long the arm's target training learns, and how."""
        return self._fine_tuning if arm.route in TRUNKS else self.job.target.training

    @property
    def _fine_tuning(self) -> BudgetConfig:
        return self.job.target.fine_tuning or self.job.target.training

    def unlabelled_batch_size(self, arm: ArmConfig) -> int:
        """U: unlabelled rows per step."""
        return self.budget(arm).batch_size * self.p_ssl(arm).loss.pseudo_per_labelled

    def pp_trunk(self, repeat: int) -> StageSpec:
        """Pseudo pre-training of the target architecture."""
        return self._pre_training(f"pp-trunk-seed{repeat}", repeat, self.pp_shards().plan())

    def real_source_trunk(self, repeat: int) -> StageSpec:
        """The same pre-training on the source data itself: a reference."""
        return self._pre_training(
            f"real_source-trunk-seed{repeat}", repeat, self.source.training_rows
        )

    def _pre_training(self, name: str, repeat: int, rows: RowsSpec | ShardPlan | None) -> StageSpec:
        pp: PPConfig | None = self.job.pp
        assert pp is not None, "the specification requires pp where an arm uses it"
        assert rows is not None, "the specification requires a trained source for real_source"
        return self._stage(
            name,
            repeat,
            NewNetwork(network=self.job.target.network, num_classes=self.source.num_classes),
            SupervisedSpec(),
            budget=pp.training,
            labelled=rows,
        )

    def teacher(self, repeat: int) -> StageSpec:
        """The source classifier fine-tuned on the target labels: teacher and reference."""
        budget = self.job.distillation.teacher_training or self._fine_tuning
        return self._stage(
            f"teacher-seed{repeat}",
            repeat,
            PretrainedTrunk(model=self.source.classifier, num_classes=self.target.num_classes),
            SupervisedSpec(),
            budget=budget,
            labelled=self.rows(repeat, "train"),
            evaluate=self.rows(repeat, "test"),
        )

    def arm(self, arm: ArmConfig, repeat: int, *, weight: float | None = None) -> StageSpec:
        """The target training of one arm; `weight` replaces the arm's lambda."""
        if arm.route == "finetune_source":
            return self.teacher(repeat)
        suffix = "" if weight is None else f"-w{weight:g}"
        objective, unlabelled, size = self._objective(arm, repeat, weight)
        return self._stage(
            f"{arm.name}{suffix}-seed{repeat}",
            repeat,
            self._start(arm, repeat),
            objective,
            budget=self.budget(arm),
            labelled=self.rows(repeat, "train"),
            unlabelled=unlabelled,
            unlabelled_batch_size=size,
            evaluate=self.rows(repeat, "test"),
        )

    def guard_stages(self, guard: Guard, weight: float) -> list[StageSpec]:
        """The trainings of one lambda, one for each fold."""
        return [self._guard_stage(guard, weight, fold) for fold in range(guard.num_folds)]

    def _guard_stage(self, guard: Guard, weight: float, fold: int) -> StageSpec:
        arm, repeat = guard.arm, guard.repeat
        kept, held_out = (
            FoldSpec(
                index=fold,
                count=guard.num_folds,
                seed=repeat_seed(self.job, repeat),
                held_out=is_held_out,
            )
            for is_held_out in (False, True)
        )
        return self.arm(arm, repeat, weight=weight).model_copy(
            update={
                "name": f"guard-{arm.name}-w{weight:g}-fold{fold}-seed{repeat}",
                "labelled": self.rows(repeat, "train", kept),
                "evaluate": self.rows(repeat, "train", held_out),
            }
        )

    def trunks(self, repeat: int) -> list[StageSpec]:
        """What the arms of a repeat start from."""
        routes = {arm.route for arm in self.job.arms}
        specs = []
        if routes & {"pp", "pp_p_ssl"}:
            specs.append(self.pp_trunk(repeat))
        if routes & {"distillation", "logit_matching", "finetune_source"}:
            specs.append(self.teacher(repeat))
        return specs

    def training_stages(self) -> list[StageSpec]:
        """All stages of the trainers after the source's, each after those that it builds on."""
        stages = {
            spec.name: spec
            for repeat in self.seeds
            for spec in [*self.trunks(repeat), *(self.arm(a, repeat) for a in self.job.arms)]
        }
        return list(stages.values())

    def _start(self, arm: ArmConfig, repeat: int) -> ModelSpec:
        if arm.route in TRUNKS:
            trunk = layout.stage_model_prefix(f"{TRUNKS[arm.route]}-seed{repeat}")
            return PretrainedTrunk(model=trunk, num_classes=self.target.num_classes)
        return NewNetwork(network=self.job.target.network, num_classes=self.target.num_classes)

    def _objective(
        self, arm: ArmConfig, repeat: int, weight: float | None
    ) -> tuple[ObjectiveSpec, RowsSpec | ShardPlan | None, int]:
        if arm.route in ("distillation", "logit_matching"):
            kinds = self.job.distillation
            kind = kinds.soft_targets if arm.route == "distillation" else kinds.logit_matching
            teacher = layout.stage_model_prefix(f"teacher-seed{repeat}")
            return DistillationSpec(distillation=kind, teacher=teacher), None, 0
        if arm.route not in ("p_ssl", "pp_p_ssl", "real_unlabelled"):
            return SupervisedSpec(), None, 0
        loss = self.p_ssl(arm).loss
        if weight is not None:
            loss = loss.model_copy(update={"weight": weight})
        if loss.weight == 0:  # no unlabelled row is read: this is supervised training
            return SupervisedSpec(), None, 0
        real = arm.route == "real_unlabelled"
        rows = self.rows(repeat, "pool") if real else self.pseudo_shards(arm, repeat).plan()
        return PSSLSpec(p_ssl=loss), rows, self.unlabelled_batch_size(arm)

    def _stage(
        self,
        name: str,
        repeat: int,
        model: ModelSpec,
        objective: ObjectiveSpec,
        *,
        budget: BudgetConfig,
        labelled: RowsSpec | ShardPlan,
        unlabelled: RowsSpec | ShardPlan | None = None,
        unlabelled_batch_size: int = 0,
        evaluate: RowsSpec | None = None,
    ) -> StageSpec:
        return training_stage(
            self.job,
            budget,
            name=name,
            seed=repeat_seed(self.job, repeat),
            model=model,
            objective=objective,
            image_shape=self.target.image_shape,
            labelled=labelled,
            unlabelled=unlabelled,
            unlabelled_batch_size=unlabelled_batch_size,
            views=self.job.target.data.views,
            evaluate=evaluate,
        )
