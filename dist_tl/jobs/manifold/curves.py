"""Test errors of a run by arm, cell and training set size: one number for each instance."""

from collections.abc import Sequence

from dist_tl.jobs.manifold.plan import baseline_name, cell_name
from dist_tl.jobs.manifold.run import ManifoldOutcome
from dist_tl.methods.hidden_manifold.cells import Cell
from dist_tl.methods.hidden_manifold.measurements import Measurement, best_simulated, best_theory
from dist_tl.report.results import Interval, interval


class Curves:
    """Lookup of measurements by arm, cell and training set size."""

    def __init__(self, outcome: ManifoldOutcome) -> None:
        self.job = outcome.plan.job
        self._measurements = outcome.measurements

    def simulated(self, arm: str, cell: Cell, num: int) -> list[float]:
        """Returns mean test errors at the reported penalty."""
        return [measurement.mean for measurement in self._reported(arm, cell, num)]

    def theory(self, arm: str, cell: Cell, num: int) -> list[float] | None:
        """Returns errors of the Gaussian theory at the reported penalty; None if any is missing."""
        return _complete([measurement.theory for measurement in self._reported(arm, cell, num)])

    def mixture(self, arm: str, cell: Cell, num: int) -> list[float] | None:
        """Returns errors of the mixture theory at the reported penalty; None if any is missing."""
        return _complete([measurement.mixture for measurement in self._reported(arm, cell, num)])

    def gap(self, cell: Cell, num: int, rival: str) -> Interval:
        """Returns the simulated error of transferred features minus that of another arm."""
        return difference(
            self.simulated("transferred", cell, num), self.simulated(rival, cell, num)
        )

    def simulated_gain(self, cell: Cell, num: int) -> list[float]:
        """Returns the gain over random features, each arm at its best penalty."""
        random, transferred = (
            self._paths("random", cell, num),
            self._paths("transferred", cell, num),
        )
        return _minus(best_simulated(random), best_simulated(transferred))

    def theory_gain(self, cell: Cell, num: int) -> list[float] | None:
        """Returns the same gain in theory; None if the theory did not converge everywhere."""
        random = best_theory(self._paths("random", cell, num))
        transferred = best_theory(self._paths("transferred", cell, num))
        return None if random is None or transferred is None else _minus(random, transferred)

    def failures(self) -> list[Measurement]:
        """Returns the measurements without a theory."""
        return [m for task in self._measurements.values() for m in task if m.failure]

    def _reported(self, arm: str, cell: Cell, num: int) -> list[Measurement]:
        reported = (None, self.job.reported_lambda)
        return [
            next(measurement for measurement in path if measurement.lam in reported)
            for path in self._paths(arm, cell, num)
        ]

    def _paths(self, arm: str, cell: Cell, num: int) -> list[list[Measurement]]:
        """The measurements of each instance, by penalty."""
        paths = []
        for instance in range(self.job.instances):
            depends_on_source = arm in ("transferred", "fine_tuned")
            name = (cell_name if depends_on_source else baseline_name)(instance, cell)
            paths.append([m for m in self._measurements[name] if (m.arm, m.samples) == (arm, num)])
        return paths


def difference(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Returns the paired difference over instances with its interval."""
    return interval(_minus(one, other))


def mean(values: Sequence[float]) -> float:
    """Returns the mean of one or more values."""
    return sum(values) / len(values)


def _minus(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def _complete(values: list[float | None]) -> list[float] | None:
    return None if None in values else [value for value in values if value is not None]
