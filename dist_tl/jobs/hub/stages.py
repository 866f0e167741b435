"""The trainings and measurements of a hub job, from its file and its data."""

from dataclasses import dataclass
from functools import cached_property

from dist_tl.cluster.config import Task
from dist_tl.datasets.images import LabelledImages
from dist_tl.errors import ConfigError, DataError
from dist_tl.jobs.hub.spec import ExpertConfig, HubArmConfig, HubJob
from dist_tl.jobs.hub.tasks import EvaluateInputs, TimeInputs
from dist_tl.jobs.stages import Part, repeat_seed, target_rows, training_stage
from dist_tl.jobs.teacher import teacher_stage
from dist_tl.methods.pseudo.distillation import DistillationConfig
from dist_tl.models.networks import Network, build_network
from dist_tl.seeds import derive_seed, torch_rng
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import ExpertSource, NewExpert, NewHub, build_expert
from dist_tl.train.models import ModelSpec
from dist_tl.train.objectives import DistillationSpec, HubSpec, ObjectiveSpec, SupervisedSpec
from dist_tl.train.rows import FoldSpec, RowsSpec, load_rows
from dist_tl.train.spec import StageSpec

MODEL_ARMS = ("distilled", "pathway")  # those with a training of their own
MEASURED_ARMS = ("pathway", "ensemble")  # those whose predictions are a task of their own


@dataclass(frozen=True)
class HubStages:
    """Names, rows, trainings and measurements of a job, except warm starts (`warm_start.py`).

    Attributes:
        store: of the run.
    """

    job: HubJob
    store: ObjectStore

    @cached_property
    def target(self) -> LabelledImages:
        """The target data, test split included."""
        return load_rows(RowsSpec(data=self.job.target.data))

    @cached_property
    def experts(self) -> dict[str, Network]:
        """Every expert with a fresh head, by name; of one that is still to be trained, its make.

        Raises:
            ConfigError: an expert is missing, or does not take the target's images.
            DataError: an expert's data is damaged.
        """
        return {
            expert.name: build_expert(
                self.source(expert) if expert.train is None else self._stand_in(expert),
                self.store,
                num_classes=self.target.num_classes,
                image_shape=self.target.image_shape,
                seed=0,
            )
            for expert in self.job.hub
        }

    def _stand_in(self, expert: ExpertConfig) -> ExpertSource:
        assert expert.train is not None, "asked for experts that the run trains"
        try:
            data = load_rows(RowsSpec(data=expert.train.data))
            adapted = expert.inputs.adapted_shape(self.target.image_shape)
        except (ConfigError, DataError) as error:
            raise type(error)(f"expert {expert.name}: {error}") from None
        if adapted != data.image_shape:
            raise ConfigError(
                f"expert {expert.name}: it is trained on images of (channels, height, width) "
                f"{data.image_shape}, and is given {adapted}; set its inputs, or its data's size"
            )
        return ExpertSource(
            name=expert.name, network=expert.train.network, inputs=expert.inputs, tap=expert.tap
        )

    def router(self) -> Network:
        """A router of the job's make, with fresh weights."""
        return build_network(
            self.job.router,
            num_classes=2 * len(self.job.hub),
            image_shape=self.target.image_shape,
            rng=torch_rng(0, "router"),
        )

    # Rows.

    def rows(self, repeat: int, part: Part, *, held_out: bool | None = None) -> RowsSpec:
        """A part of the target data; of the training part optionally one side of a fold."""
        fold = None
        if held_out is not None:
            seed, count = repeat_seed(self.job, repeat), self.job.validation_folds
            fold = FoldSpec(index=0, count=count, seed=seed, held_out=held_out)
        return target_rows(self.job, self.job.target, repeat, part, fold=fold)

    # Experts.

    def pretraining(self) -> list[StageSpec]:
        """The trainings of experts that the run makes itself, one worker each."""
        return [
            teacher_stage(
                expert.train,
                seed=derive_seed(self.job.seed, expert.name),
                name=f"expert-{expert.name}",
            )
            for expert in self.job.hub
            if expert.train is not None
        ]

    def source(self, expert: ExpertConfig) -> ExpertSource:
        """Where an expert's pre-trained weights are."""
        model = expert.model
        if expert.train is not None:
            model = layout.stage_model_prefix(f"expert-{expert.name}")
        return ExpertSource(
            name=expert.name,
            model=model,
            network=expert.network,
            inputs=expert.inputs,
            tap=expert.tap,
        )

    # Trainings.

    def singles(self, repeat: int) -> list[StageSpec]:
        """Every expert fine-tuned on the labelled images."""
        return [
            self._stage(f"single-{expert.name}-seed{repeat}", repeat, self._alone(expert, repeat))
            for expert in self.job.hub
        ]

    def picks(self, repeat: int) -> list[StageSpec]:
        """The same on all but one fold, measured on that fold: what picks the best one."""
        return [
            self._stage(
                f"pick-{expert.name}-seed{repeat}",
                repeat,
                self._alone(expert, repeat, picking=True),
            ).model_copy(
                update={
                    "labelled": self.rows(repeat, "train", held_out=False),
                    "evaluate": self.rows(repeat, "train", held_out=True),
                }
            )
            for expert in self.job.hub
        ]

    def _alone(self, expert: ExpertConfig, repeat: int, *, picking: bool = False) -> NewExpert:
        name = f"{'pick' if picking else 'single'}-{expert.name}-seed{repeat}"
        return NewExpert(
            expert=self.source(expert), num_classes=self.target.num_classes, warm=self._warm(name)
        )

    def _warm(self, stage: str) -> str | None:
        """Where the warm start of a stage leaves what it learnt; None where there is none."""
        return layout.stage_model_prefix(f"warm-{stage}") if self.job.warm_start else None

    def model_arms(self) -> list[HubArmConfig]:
        """The arms that train a model of their own."""
        return [arm for arm in self.job.arms if arm.route in MODEL_ARMS]

    def arm(self, arm: HubArmConfig, repeat: int, *, best: str) -> StageSpec:
        """The training of one arm.

        Args:
            best: the single expert that validation picked; the distilled student is of its make.
        """
        name = f"{arm.name}-seed{repeat}"
        if arm.route == "pathway":
            return self._stage(name, repeat, self.hub(arm, repeat), HubSpec(loss=arm.loss))
        teachers = tuple(layout.stage_model_prefix(spec.name) for spec in self.singles(repeat))
        student = next(expert for expert in self.job.hub if expert.name == best)
        config = DistillationConfig(temperature=self.job.distillation_temperature)
        objective = DistillationSpec(distillation=config, teacher=teachers)
        return self._stage(name, repeat, self._alone(student, repeat), objective)

    def hub(self, arm: HubArmConfig, repeat: int) -> NewHub:
        """The model of an arm that routes."""
        return NewHub(
            experts=tuple(map(self.source, self.job.hub)),
            router=self.job.router,
            routes=arm.routes,
            batchnorm=self.job.expert_batchnorm,
            first_bias=arm.first_bias,
            warm=self._warm(f"{arm.name}-seed{repeat}"),
            num_classes=self.target.num_classes,
        )

    def _stage(
        self,
        name: str,
        repeat: int,
        model: ModelSpec,
        objective: ObjectiveSpec | None = None,
    ) -> StageSpec:
        return training_stage(
            self.job,
            self.job.target.training,
            name=name,
            seed=repeat_seed(self.job, repeat),
            model=model,
            objective=objective or SupervisedSpec(),
            image_shape=self.target.image_shape,
            labelled=self.rows(repeat, "train"),
            views=self.job.target.data.views,
            evaluate=self.rows(repeat, "test"),
        )

    # Measurements.

    def evaluation_keys(self) -> list[tuple[str, int]]:
        """Arm and repeat of every evaluation."""
        arms = [arm.name for arm in self.job.arms if arm.route in MEASURED_ARMS]
        return [(arm, repeat) for arm in arms for repeat in range(self.job.seeds)]

    def evaluations(self) -> list[Task[EvaluateInputs]]:
        """Routes and predictions of every hub, and of the ensemble, on the test split."""
        arms = {arm.name: arm for arm in self.job.arms}
        return [
            Task(f"evaluate-{name}-seed{repeat}", self._evaluation(arms[name], repeat))
            for name, repeat in self.evaluation_keys()
        ]

    def _evaluation(self, arm: HubArmConfig, repeat: int) -> EvaluateInputs:
        rows = self.rows(repeat, "test")
        if arm.route == "pathway":
            hub = layout.stage_model_prefix(f"{arm.name}-seed{repeat}")
            return EvaluateInputs(hub=hub, members=(), rows=rows)
        names = [spec.name for spec in self.singles(repeat)]
        members = tuple(map(layout.stage_model_prefix, names))
        return EvaluateInputs(hub=None, members=members, rows=rows)

    def timing(self, best: str) -> Task[TimeInputs]:
        """Seconds and multiply-adds of every arm's first model, measured one after another."""
        models = {}
        for arm in self.job.arms:
            if arm.route == "ensemble":
                names = tuple(spec.name for spec in self.singles(0))
            elif arm.route == "best_single":
                names = (f"single-{best}-seed0",)
            else:
                names = (f"{arm.name}-seed0",)
            models[arm.name] = tuple(map(layout.stage_model_prefix, names))
        hubs = tuple(arm.name for arm in self.job.arms if arm.route == "pathway")
        return Task("timing", TimeInputs(models=models, hubs=hubs, rows=self.rows(0, "test")))
