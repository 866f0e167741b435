"""Plans a transfer job: every stage, as a pure function of the job and of facts about its data.

Names, seeds and budgets are decided only here, so that the plan that a user sees, a run and a
resumed run cannot disagree. Arms of one seed share the labelled images, their order and the
initial weights: differences between them are paired.
"""

import hashlib
from dataclasses import dataclass
from typing import Any

from dist_tl.config import fingerprint
from dist_tl.errors import ConfigError
from dist_tl.jobs.plan import PlanTable, plan_table
from dist_tl.jobs.source.plan import SourceFacts, forbid_source_data, source_facts, source_stages
from dist_tl.jobs.spec import BudgetConfig
from dist_tl.jobs.stages import Part, drawn_items, repeat_seed, target_rows, training_stage
from dist_tl.jobs.transfer.spec import UNLABELLED, ArmConfig, PSSLArmConfig, TransferJob
from dist_tl.methods.pseudo.guard import GuardConfig, GuardDecision, num_guard_folds
from dist_tl.shards.drawing import ByClass, ByTarget, GenerateSpec
from dist_tl.shards.order import ShardPlan, check_sizes
from dist_tl.shards.writer import ShardConfig
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import ModelSpec, NewNetwork, PretrainedTrunk
from dist_tl.train.objectives import DistillationSpec, PSSLSpec, SupervisedSpec
from dist_tl.train.rows import FoldSpec, RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

PP_SHARDS = "pp-shards"
PP_TRUNK, SOURCE_TRUNK, TEACHER = "pp-trunk", "real_source-trunk", "teacher"
# The pretrained trunk that a route fine-tunes; other routes start from fresh weights.
TRUNKS = {"pp": PP_TRUNK, "pp_p_ssl": PP_TRUNK, "real_source": SOURCE_TRUNK}
TAUGHT = ("distillation", "logit_matching")


@dataclass(frozen=True)
class TargetFacts:
    """Shape, classes and content of the target data."""

    image_shape: tuple[int, int, int]
    num_classes: int
    class_names: tuple[str, ...]
    fingerprint: str  # of all images


@dataclass(frozen=True)
class Guard:
    """The cross-validation that chooses the lambda of one arm in one repeat.

    Attributes:
        trials: for each lambda a short training per fold.
    """

    arm: ArmConfig
    repeat: int
    trials: dict[float, list[StageSpec]]


def plan(job: TransferJob, store: ObjectStore) -> "TransferPlan":
    """The stages of a job; source data is loaded only if the source is not trained yet.

    Raises:
        ConfigError: images, lanes or batches do not fit, or K is larger than a class; names both.
        DataError: data is damaged.
    """
    source = source_facts(job, job.source, store)
    load_rows(target_rows(job, job.target, 0, "train"))  # K must not exceed any class
    images = load_rows(RowsSpec(data=job.target.data))
    target = TargetFacts(
        image_shape=images.image_shape,
        num_classes=images.num_classes,
        class_names=images.class_names,
        fingerprint=hashlib.sha256(images.images.tobytes()).hexdigest()[:16],
    )
    plan = TransferPlan(job, source, target)
    plan.check()
    return plan


@dataclass(frozen=True)
class TransferPlan:
    """The stages of one job."""

    job: TransferJob
    source: SourceFacts
    target: TargetFacts

    def check(self) -> None:
        """Checks that image shapes, lanes and batches fit, and that no source data is target data.

        Raises:
            ConfigError: naming both shapes, the nearest sizes that work, or the stage.
        """
        source, target = tuple(self.source.image_shape), tuple(self.target.image_shape)
        if source != target:
            raise ConfigError(
                f"target images are (channels, height, width) {target}, the source's are "
                f"{source}; set target.data.size and target.data.channels to the source's"
            )
        workers = self.job.trainers.workers
        for spec in self.generate_stages():
            check_sizes(spec.plan(), batch_size=self.read_batch_size(spec), world_size=workers)
        # A resumed run may have lost its source data after the source phase, and was checked then.
        if self.source.classifier_accuracy is None:
            forbid_source_data(self.training_stages(), self.job.source)

    def table(self) -> PlanTable:
        """All stages, those of the source first, and the number of guard trials."""
        sources = source_stages(self.job, self.job.source, self.source)
        return plan_table(
            self.job,
            generate=self.generate_stages(),
            train=[*sources, *self.references(), *self.training_stages()],
            trials=sum(len(t) for guard in self.guards() for t in guard.trials.values()),
        )

    @property
    def seeds(self) -> range:
        """The repeats."""
        return range(self.job.seeds)

    def rows(self, repeat: int, part: Part, fold: FoldSpec | None = None) -> RowsSpec:
        """A part of the target data."""
        return target_rows(self.job, self.job.target, repeat, part, fold=fold)

    def pseudo_arms(self) -> list[ArmConfig]:
        """The arms that learn from pseudo samples in addition to labelled images."""
        return [arm for arm in self.job.arms if arm.route in ("p_ssl", "pp_p_ssl")]

    def p_ssl(self, arm: ArmConfig) -> PSSLArmConfig:
        """The P-SSL settings of an arm."""
        config = arm.p_ssl or self.job.p_ssl
        assert config is not None, "the specification requires p_ssl for arms that use it"
        return config

    # Pseudo samples.

    def generate_stages(self) -> list[GenerateSpec]:
        """All stages of pseudo samples, in the order in which trainers read them."""
        stages = [self.pseudo_shards(arm, r) for r in self.seeds for arm in self.pseudo_arms()]
        if (pp := self.pp_shards()) is not None:
            stages.insert(0, pp)
        return list({spec.name: spec for spec in stages}.values())

    def pp_shards(self) -> GenerateSpec | None:
        """The samples of pseudo pre-training, one set for all repeats; None if no arm uses it."""
        if self.job.pp is None or not self._uses("pp", "pp_p_ssl"):
            return None
        return self._generate(PP_SHARDS, self.job.seed, self.job.pp.num_samples, ByClass())

    def pseudo_shards(self, arm: ArmConfig, repeat: int) -> GenerateSpec:
        """The samples of P-SSL, conditioned on the labelled images of one repeat."""
        config = self.p_ssl(arm)
        # Arms with the job's settings share stored samples. The number of fresh ones depends on
        # the arm's budget.
        owner = "p_ssl" if arm.p_ssl is None and config.samples else arm.name
        return self._generate(
            f"{owner}-shards-seed{repeat}",
            repeat_seed(self.job, repeat),
            config.samples or self._budget(arm).steps * self._unlabelled_batch_size(arm),
            ByTarget(condition=config.loss.condition),
            conditions_fingerprint=fingerprint(
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
        return max(self._unlabelled_batch_size(arm) for arm in self.pseudo_arms())

    def _generate(
        self, name: str, seed: int, num_samples: int, draw: ByClass | ByTarget, **fields: Any
    ) -> GenerateSpec:
        return GenerateSpec(
            name=name,
            seed=seed,
            generator=self.source.generator,
            generator_fingerprint=self.source.generator_fingerprint,
            num_classes=self.source.num_classes,
            image_shape=self.source.image_shape,
            draw=draw,
            num_samples=num_samples,
            batch_size=self.job.sample_batch_size,
            shards=self.job.shards or ShardConfig(lanes=self.job.lanes),
            **fields,
        )

    # Training.

    def training_stages(self) -> list[StageSpec]:
        """All trainings after the source phase, each after those that it builds on."""
        stages = [spec for repeat in self.seeds for spec in self.repeat_stages(repeat)]
        return list({spec.name: spec for spec in stages}.values())

    def repeat_stages(self, repeat: int) -> list[StageSpec]:
        """The trainings of one repeat: pretrained trunk and teacher if arms use them, then arms."""
        stages = [self.arm(arm, repeat) for arm in self.job.arms]
        if self._uses(*TAUGHT, "finetune_source"):
            stages.insert(0, self._teacher(repeat))
        if (pp := self.pp_shards()) is not None:
            stages.insert(0, self._pre_training(PP_TRUNK, repeat, pp.plan()))
        return list({spec.name: spec for spec in stages}.values())

    def references(self) -> list[StageSpec]:
        """Pre-trainings on the source data itself, for the reference arm real_source."""
        if not self._uses("real_source"):
            return []
        rows = self.source.training_rows
        assert rows is not None, "the specification requires source data for real_source"
        return [self._pre_training(SOURCE_TRUNK, repeat, rows) for repeat in self.seeds]

    def arm(self, arm: ArmConfig, repeat: int, *, weight: float | None = None) -> StageSpec:
        """The target training of one arm; `weight` replaces its lambda."""
        if arm.route == "finetune_source":
            return self._teacher(repeat)
        suffix = "" if weight is None else f"-w{weight:g}"
        model = NewNetwork(network=self.job.target.network, num_classes=self.target.num_classes)
        if arm.route in TRUNKS:
            trunk = layout.stage_model_prefix(f"{TRUNKS[arm.route]}-seed{repeat}")
            model = PretrainedTrunk(model=trunk, num_classes=self.target.num_classes)
        name, objective = f"{arm.name}{suffix}-seed{repeat}", self._objective(arm, repeat, weight)
        return self._stage(name, repeat, self._budget(arm), model, **objective)

    def final(self, arm: ArmConfig, repeat: int, decision: GuardDecision | None) -> StageSpec:
        """The training whose model an arm keeps, with the lambda that its guard chose."""
        if decision is None or decision.weight == self.p_ssl(arm).loss.weight:
            return self.arm(arm, repeat)
        if decision.weight > 0:
            return self.arm(arm, repeat, weight=decision.weight)
        # With lambda = 0 an arm equals the arm without pseudo samples bit for bit.
        route = "pp" if arm.route == "pp_p_ssl" else "scratch"
        return self.arm(ArmConfig(name=route, route=route), repeat)

    def guards(self) -> list[Guard]:
        """The lambda guards that have enough labels for a cross-validation."""
        guards = []
        for arm in self.pseudo_arms():
            loss = self.p_ssl(arm).loss
            if not isinstance(loss.lambda_guard, GuardConfig):
                continue
            for repeat in self.seeds:
                rows = load_rows(self.rows(repeat, "train"))
                labels = rows.labels[drawn_items(self.job, rows)]
                if count := num_guard_folds(labels, loss.lambda_guard):
                    weights = loss.lambda_guard.candidates(loss.weight)
                    trials = {
                        weight: self._trials(arm, repeat, weight, count) for weight in weights
                    }
                    guards.append(Guard(arm, repeat, trials))
        return guards

    def _trials(self, arm: ArmConfig, repeat: int, weight: float, count: int) -> list[StageSpec]:
        full, seed = self.arm(arm, repeat, weight=weight), repeat_seed(self.job, repeat)
        trials = []
        for index in range(count):
            kept = FoldSpec(index=index, count=count, seed=seed, held_out=False)
            held_out = kept.model_copy(update={"held_out": True})
            changes = {
                "name": f"guard-{arm.name}-w{weight:g}-fold{index}-seed{repeat}",
                "labelled": self.rows(repeat, "train", kept),
                "evaluate": self.rows(repeat, "train", held_out),
            }
            trials.append(full.model_copy(update=changes))
        return trials

    def _uses(self, *routes: str) -> bool:
        return any(arm.route in routes for arm in self.job.arms)

    @property
    def _fine_tuning(self) -> BudgetConfig:
        return self.job.target.fine_tuning or self.job.target.training

    def _budget(self, arm: ArmConfig) -> BudgetConfig:
        return self._fine_tuning if arm.route in TRUNKS else self.job.target.training

    def _unlabelled_batch_size(self, arm: ArmConfig) -> int:
        return self._budget(arm).batch_size * self.p_ssl(arm).loss.pseudo_per_labelled

    def _pre_training(self, name: str, repeat: int, rows: RowsSpec | ShardPlan) -> StageSpec:
        job = self.job
        assert job.pp is not None, "the specification requires pp for arms that use it"
        model = NewNetwork(network=job.target.network, num_classes=self.source.num_classes)
        name = f"{name}-seed{repeat}"
        return self._stage(name, repeat, job.pp.training, model, labelled=rows, evaluate=None)

    def _teacher(self, repeat: int) -> StageSpec:
        """The source classifier, fine-tuned on the target labels."""
        model = PretrainedTrunk(model=self.source.classifier, num_classes=self.target.num_classes)
        budget = self.job.distillation.teacher_training or self._fine_tuning
        return self._stage(f"{TEACHER}-seed{repeat}", repeat, budget, model)

    def _objective(self, arm: ArmConfig, repeat: int, weight: float | None) -> dict[str, Any]:
        if arm.route in TAUGHT:
            settings, soft = self.job.distillation, arm.route == "distillation"
            objective = DistillationSpec(
                distillation=settings.soft_targets if soft else settings.logit_matching,
                teacher=layout.stage_model_prefix(f"{TEACHER}-seed{repeat}"),
            )
            return {"objective": objective}
        if arm.route not in UNLABELLED:
            return {}
        loss = self.p_ssl(arm).loss
        if weight is not None:
            loss = loss.model_copy(update={"weight": weight})
        if loss.weight == 0:  # supervised training: no unlabelled row is read
            return {}
        real = arm.route == "real_unlabelled"
        rows = self.rows(repeat, "pool") if real else self.pseudo_shards(arm, repeat).plan()
        return {
            "objective": PSSLSpec(p_ssl=loss),
            "unlabelled": rows,
            "unlabelled_batch_size": self._unlabelled_batch_size(arm),
        }

    def _stage(
        self, name: str, repeat: int, budget: BudgetConfig, model: ModelSpec, **fields: Any
    ) -> StageSpec:
        supervised = {
            "objective": SupervisedSpec(),
            "labelled": self.rows(repeat, "train"),
            "evaluate": self.rows(repeat, "test"),
        }
        return training_stage(
            self.job,
            budget,
            name=name,
            seed=repeat_seed(self.job, repeat),
            model=model,
            image_shape=self.target.image_shape,
            views=self.job.target.data.views,
            **{**supervised, **fields},
        )
