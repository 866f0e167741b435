"""The training loop: take a batch, take a step, remember where we are."""

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dist_tl.errors import NonFiniteLossError
from dist_tl.telemetry import MetricsLog
from dist_tl.train.checkpoints import Checkpoints, TrainState
from dist_tl.train.engine import Engine
from dist_tl.train.feeds import Batch, Feed
from dist_tl.train.objectives import Figures, Objective


def fit(
    engine: Engine,
    objective: Objective,
    feed: Feed,
    state: TrainState,
    *,
    num_steps: int,
    checkpoints: Checkpoints,
    record: "StepRecord",
) -> TrainState:
    """Train from `state` until `num_steps` optimizer steps are done; return the final state.

    Stopping at a checkpoint and calling again with its state gives the same weights, bit for
    bit, as never having stopped.

    Raises:
        ShardTimeoutError: the generators fell further behind than the stream may wait.
        NonFiniteLossError: the loss left the finite numbers; the step is not checkpointed.
    """
    steps = feed.read_from(state.cursor)
    while state.step < num_steps:
        micro_batches = next(steps)
        parts = [_micro_step(engine, objective, batch, state.step) for batch in micro_batches]
        state = state.advance()
        record.add(state.step, parts, feed.seconds_starved)
        if checkpoints.is_due(state.step) and state.step < num_steps:
            record.flush()
            checkpoints.save(engine, state)
    record.flush()
    return state


def _micro_step(
    engine: Engine, objective: Objective, batch: Batch, step: int
) -> tuple[Tensor, Figures]:
    with engine.autocast():
        loss, figures = objective(engine.module, batch, step)
    engine.backward(loss)
    engine.step()
    return loss.detach(), figures


class StepRecord:
    """The loss of every step as the mean over ranks, gathered once in `every` steps.

    One collective for many steps keeps the log off the critical path, and makes all ranks see a
    non-finite loss together, so that all of them stop. `flush` is a collective.
    """

    def __init__(
        self,
        metrics: MetricsLog | None,
        *,
        stage: str,
        every: int,
        on_progress: Callable[[int, float], None],
    ) -> None:
        self._metrics, self._stage, self._every = metrics, stage, every
        self._on_progress = on_progress
        self._rows: list[tuple[int, float, list[tuple[Tensor, Figures]], float]] = []
        self.first_step_at: float | None = None
        self.last_loss = float("nan")

    def add(
        self, step: int, parts: Sequence[tuple[Tensor, Figures]], seconds_starved: float
    ) -> None:
        """Remember the micro-batches of one optimizer step."""
        now = time.time()
        self.first_step_at = self.first_step_at or now
        self._rows.append((step, now, list(parts), seconds_starved))
        if len(self._rows) >= self._every:
            self.flush()

    def flush(self) -> None:
        """Average over the ranks, check, and write.

        Raises:
            NonFiniteLossError: on every rank, naming the first bad step.
        """
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        values = [_mean_figures(parts) for _, _, parts, _ in rows]
        table = torch.stack([torch.stack(list(row.values())) for row in values])
        dist.all_reduce(table)
        means = (table / dist.get_world_size()).cpu().tolist()
        for (step, at, _, starved), names, row in zip(rows, values, means, strict=True):
            named: dict[str, Any] = dict(zip(names, row, strict=True))
            if not torch.isfinite(torch.tensor(named["loss"])):
                raise NonFiniteLossError(
                    f"stage {self._stage}: the loss is {named['loss']} at step {step}; lower the "
                    "learning rate, or look at the batch of that step"
                )
            if self._metrics is not None:
                self._metrics.log(step=step, at=round(at, 3), **named, starved_s=round(starved, 3))
            self.last_loss = named["loss"]
        self._on_progress(rows[-1][0], self.last_loss)

    def close(self) -> None:
        """Write what is left of the metric rows."""
        if self._metrics is not None:
            self._metrics.flush()


def _mean_figures(parts: Sequence[tuple[Tensor, Figures]]) -> dict[str, Tensor]:
    rows = [{"loss": loss.float(), **figures} for loss, figures in parts]
    return {name: torch.stack([row[name].float() for row in rows]).mean() for name in rows[0]}


def read_rows(data: bytes | None) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; none where there is no file."""
    return [json.loads(line) for line in (data or b"").splitlines() if line.strip()]
