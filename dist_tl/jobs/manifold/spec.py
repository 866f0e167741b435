"""The specification of a job of kind `manifold`: related tasks and measurements on them.

A *cell* is one relation between source and target; an *instance* is one source task with its
trained network; a *draw* is one target training set.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from dist_tl.cluster.config import TrialsConfig
from dist_tl.config import StrictModel
from dist_tl.jobs.spec import JobConfig
from dist_tl.methods.hidden_manifold.activations import ODD
from dist_tl.methods.hidden_manifold.cells import Cell, Knob
from dist_tl.methods.hidden_manifold.saddle_point import MIN_LAM
from dist_tl.methods.hidden_manifold.sampling import ManifoldConfig
from dist_tl.methods.hidden_manifold.student import TrainingConfig

Arm = Literal["transferred", "random", "two_layer", "fine_tuned"]


class SweepConfig(StrictModel):
    """Values of one knob; all others are as in `model`."""

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


class ManifoldJob(JobConfig):
    """When does transfer help? Simulation and theory on tasks whose relation is known."""

    model: ManifoldConfig = Field(
        default_factory=ManifoldConfig, description="Base tasks that sweeps start from."
    )
    hidden: int = Field(default=200, ge=2, description="Hidden units K of every student.")
    activation: Literal["tanh", "erf", "relu"] = Field(
        default="tanh", description="Activation of the hidden units."
    )
    source_samples: int = Field(default=8000, ge=1, description="Source training samples n_s.")
    source_training: TrainingConfig = Field(default_factory=TrainingConfig)
    arms: tuple[Arm, ...] = ("transferred", "random", "two_layer")
    samples: tuple[int, ...] = Field(
        default=(50, 200, 800, 3200), min_length=1, description="Target training set sizes n."
    )
    lambdas: tuple[float, ...] = Field(
        default=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0),
        min_length=1,
        description="L2 penalties of the readout; the loss is summed over samples.",
    )
    reported_lambda: float = Field(default=1e-2, description="Penalty of tables and charts.")
    loss: Literal["logistic", "ridge"] = "logistic"
    sweeps: tuple[SweepConfig, ...] = ()
    grid: GridConfig | None = None
    instances: int = Field(default=3, ge=1, description="Source tasks; intervals are over these.")
    draws: int = Field(default=4, ge=1, description="Target training sets of each instance.")
    moment_samples: int = Field(
        default=100_000, ge=1000, description="Monte Carlo samples of the theory's covariances."
    )
    moment_tasks: int = Field(
        default=1, ge=1, description="Ray tasks for the moments of one cell; more for large K."
    )
    test_samples: int = Field(default=60_000, ge=1000)
    mixture: bool = Field(
        default=True, description="Also solve the mixture theory for cells of matched tasks."
    )
    trials: TrialsConfig = Field(
        default_factory=TrialsConfig, description="Resources and retries of the tasks."
    )

    @model_validator(mode="after")
    def _fields_are_consistent(self) -> Self:
        if min(self.samples) < 1:
            raise ValueError(f"samples: expected sizes of 1 or more, got {min(self.samples)}")
        if min(self.lambdas) < MIN_LAM:
            raise ValueError(
                f"lambdas: the theory needs penalties of {MIN_LAM:g} or more (at 0, separable data "
                f"has no optimum), got {min(self.lambdas):g}"
            )
        if self.reported_lambda not in self.lambdas:
            raise ValueError(f"reported_lambda: expected one of {self.lambdas}")
        if self.model.input_activation not in ODD:
            raise ValueError(
                f"model.input_activation: the theory of random features needs inputs of mean 0; "
                f"expected one of {', '.join(sorted(ODD))}, got {self.model.input_activation}"
            )
        if "random" not in self.arms or "transferred" not in self.arms:
            raise ValueError("arms: every job compares transferred with random; add both")
        self.cells()  # raises ValueError if a knob is out of its range
        return self

    def base(self) -> Cell:
        """Returns the relation that sweeps start from."""
        return Cell(model=self.model)

    def swept(self, sweep: SweepConfig) -> list[Cell]:
        """Returns the cells of one sweep, in the order of its values."""
        base = self.base()
        return [base.with_knobs(**{sweep.knob: value}) for value in sweep.values]

    def gridded(self) -> list[list[Cell]]:
        """Returns the cells of the grid, a row for each value of y."""
        if self.grid is None:
            return []
        base, x, y = self.base(), self.grid.x, self.grid.y
        return [
            [base.with_knobs(**{x.knob: column, y.knob: row}) for column in x.values]
            for row in y.values
        ]

    def cells(self) -> list[Cell]:
        """Returns every cell once, the base cell first."""
        swept = [cell for sweep in self.sweeps for cell in self.swept(sweep)]
        gridded = [cell for row in self.gridded() for cell in row]
        return list({cell.name: cell for cell in (self.base(), *swept, *gridded)}.values())

    def source_cells(self) -> list[Cell]:
        """Returns one matched cell for each latent size of a source."""
        sizes = {cell.model.source_latent for cell in self.cells()}
        return [self.base().matched(size) for size in sorted(sizes)]

    def target_cells(self) -> list[Cell]:
        """Returns one matched cell for each latent size of a target."""
        sizes = {cell.model.target_latent for cell in self.cells()}
        return [self.base().matched(size) for size in sorted(sizes)]
