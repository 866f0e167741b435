"""Cells: one relation between source and target each, made by changing knobs of another cell."""

from typing import Literal, Self

from pydantic import ValidationError

from dist_tl.config import StrictModel
from dist_tl.methods.hidden_manifold.sampling import Knobs, ManifoldConfig

Knob = Literal["feature_corr", "substituted", "teacher_corr", "source_latent", "target_latent"]


class Cell(StrictModel):
    """One relation of source and target."""

    model: ManifoldConfig

    def value(self, knob: Knob) -> float:
        """Returns the value of a knob in this cell."""
        holder = self.model.knobs if knob in Knobs.model_fields else self.model
        return float(getattr(holder, knob))

    @property
    def name(self) -> str:
        """Unique name of the relation, part of the names of stages."""
        knobs, model = self.model.knobs, self.model
        return (
            f"ds{model.source_latent}-dt{model.target_latent}-f{knobs.feature_corr:g}"
            f"-s{knobs.substituted:g}-t{knobs.teacher_corr:g}"
        )

    @property
    def is_matched(self) -> bool:
        """Whether source and target are the same task."""
        same_size = self.model.source_latent == self.model.target_latent
        return same_size and self.model.knobs == Knobs()

    def matched(self, latent: int) -> Self:
        """Returns a cell whose source and target are the same task of `latent` dimensions."""
        same = {"source_latent": latent, "target_latent": latent, "knobs": Knobs()}
        return type(self)(model=self.model.model_copy(update=same))

    def with_knobs(self, **values: float) -> Self:
        """Returns this cell with some knobs changed.

        Raises:
            ValueError: a knob is out of its range.
        """
        model = self.model.model_dump()
        for knob, value in values.items():
            if knob in model["knobs"]:
                model["knobs"][knob] = float(value)
            elif value == int(value):
                model[knob] = int(value)
            else:
                raise ValueError(f"{knob}: expected a whole number, got {value}")
        try:
            return type(self)(model=ManifoldConfig.model_validate(model))
        except ValidationError as error:
            knobs = ", ".join(f"{knob} = {value:g}" for knob, value in values.items())
            raise ValueError(f"{knobs}: {error.errors()[0]['msg']}") from None
