"""What a job of kind `manifold` can say: which related tasks, which measurements.

A *cell* is one relation between source and target; an *instance* is one source task with its
trained network; a *draw* is one target training set.
"""

from collections.abc import Iterator
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from dist_tl.cluster.config import TrialsConfig
from dist_tl.config import StrictModel
from dist_tl.jobs.spec import JobConfig
from dist_tl.methods.hidden_manifold.activations import ODD
from dist_tl.methods.hidden_manifold.sampling import Knobs, ManifoldConfig
from dist_tl.methods.hidden_manifold.student import TrainingConfig

Knob = Literal["feature_corr", "substituted", "teacher_corr", "source_latent", "target_latent"]
Arm = Literal["transferred", "random", "two_layer", "fine_tuned"]
MIN_LAMBDA = 1e-6


class SweepConfig(StrictModel):
    """One knob changed, all others as in `model`."""

    knob: Knob
    values: tuple[float, ...] = Field(min_length=1)


class GridConfig(StrictModel):
    """Two knobs changed together: a phase diagram of the gain over random features."""

    x: SweepConfig
    y: SweepConfig

    @model_validator(mode="after")
    def _two_knobs(self) -> Self:
        if self.x.knob == self.y.knob:
            raise ValueError(f"grid: expected two different knobs, got {self.x.knob} twice")
        return self


class Cell(StrictModel):
    """One relation of source and target."""

    model: ManifoldConfig

    def value(self, knob: Knob) -> float:
        """The value of a knob in this cell."""
        if knob in ("source_latent", "target_latent"):
            return float(getattr(self.model, knob))
        return float(getattr(self.model.knobs, knob))

    @property
    def name(self) -> str:
        """Unique for the relation; part of the names of stages."""
        knobs, model = self.model.knobs, self.model
        return (
            f"ds{model.source_latent}-dt{model.target_latent}-f{knobs.feature_corr:g}"
            f"-s{knobs.substituted:g}-t{knobs.teacher_corr:g}"
        )

    @property
    def is_matched(self) -> bool:
        """Whether both tasks are the same one."""
        same_size = self.model.source_latent == self.model.target_latent
        return same_size and self.model.knobs == Knobs()


class ManifoldJob(JobConfig):
    """When does transfer help? Simulation and theory on tasks whose relation is known."""

    model: ManifoldConfig = Field(
        default_factory=ManifoldConfig, description="The tasks that sweeps start from."
    )
    hidden: int = Field(default=200, ge=2, description="Hidden units K of every student.")
    activation: Literal["tanh", "erf", "relu"] = Field(
        default="tanh", description="Of the hidden units."
    )
    source_samples: int = Field(
        default=8000, ge=1, description="Training samples of a source, n_s."
    )
    source_training: TrainingConfig = Field(default_factory=TrainingConfig)
    arms: tuple[Arm, ...] = ("transferred", "random", "two_layer")
    samples: tuple[int, ...] = Field(
        default=(50, 200, 800, 3200), min_length=1, description="Target training set sizes, n."
    )
    lambdas: tuple[float, ...] = Field(
        default=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
        min_length=1,
        description="Penalties of the readout, beside a loss summed over samples.",
    )
    reported_lambda: float = Field(
        default=1e-2, description="The one whose errors are tabled and plotted."
    )
    loss: Literal["logistic", "ridge"] = "logistic"
    sweeps: tuple[SweepConfig, ...] = ()
    grid: GridConfig | None = None
    instances: int = Field(default=3, ge=1, description="Sources; intervals are over these.")
    draws: int = Field(default=4, ge=1, description="Target training sets of each instance.")
    moment_samples: int = Field(
        default=100_000, ge=1000, description="Monte Carlo samples of the theory's covariances."
    )
    moment_tasks: int = Field(
        default=1,
        ge=1,
        description="Ray tasks that share the moments of one cell; more for large K.",
    )
    test_samples: int = Field(default=60_000, ge=1000)
    mixture: bool = Field(
        default=True,
        description="Also the mixture theory, where source and target are the same task.",
    )
    trials: TrialsConfig = Field(default_factory=TrialsConfig, description="How tasks are run.")

    @model_validator(mode="after")
    def _numbers_make_sense(self) -> Self:
        if min(self.samples) < 1:
            raise ValueError(f"samples: expected sizes of 1 or more, got {min(self.samples)}")
        if min(self.lambdas) < MIN_LAMBDA:
            raise ValueError(
                f"lambdas: the theory is solvable from {MIN_LAMBDA:g} on (at 0 separable data has "
                f"no optimum), got {min(self.lambdas):g}"
            )
        if self.reported_lambda not in self.lambdas:
            raise ValueError(f"reported_lambda: expected one of {self.lambdas}")
        if self.model.input_activation not in ODD:
            raise ValueError(
                f"model.input_activation: the theory of random features needs inputs of mean 0; "
                f"expected one of {', '.join(sorted(ODD))}, got {self.model.input_activation}"
            )
        if "random" not in self.arms or "transferred" not in self.arms:
            raise ValueError("arms: transferred and random are what is compared; add them")
        for cell in self.cells():  # every value of every sweep must be one that the model can take
            assert cell.model.inputs >= 1
        return self

    def base(self) -> Cell:
        """The relation that sweeps start from."""
        return Cell(model=self.model)

    def with_knobs(self, **values: float) -> Cell:
        """The base cell with some knobs changed.

        Raises:
            ValueError: a knob is out of its range.
        """
        model = self.model.model_dump()
        for knob, value in values.items():
            if knob in ("source_latent", "target_latent"):
                if value != int(value):
                    raise ValueError(f"{knob}: expected a whole number, got {value}")
                model[knob] = int(value)
            else:
                model["knobs"][knob] = float(value)
        try:
            return Cell(model=ManifoldConfig.model_validate(model))
        except ValidationError as error:
            wanted = ", ".join(f"{knob} = {value:g}" for knob, value in values.items())
            raise ValueError(f"{wanted}: {error.errors()[0]['msg']}") from None

    def swept(self, sweep: SweepConfig) -> list[Cell]:
        """The cells of one sweep, in its order."""
        return [self.with_knobs(**{sweep.knob: value}) for value in sweep.values]

    def gridded(self) -> list[list[Cell]]:
        """The cells of the grid: a row for each value of y."""
        if self.grid is None:
            return []
        x, y = self.grid.x, self.grid.y
        return [
            [self.with_knobs(**{x.knob: across, y.knob: up}) for across in x.values]
            for up in y.values
        ]

    def cells(self) -> list[Cell]:
        """Every cell once, the base cell first."""
        return list({cell.name: cell for cell in self._all_cells()}.values())

    def _all_cells(self) -> Iterator[Cell]:
        yield self.base()
        for sweep in self.sweeps:
            yield from self.swept(sweep)
        for row in self.gridded():
            yield from row
