"""The training loop, and the record of its losses."""

import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dist_tl.errors import NonFiniteLossError, NumericsError
from dist_tl.telemetry import MetricsLog
from dist_tl.train.checkpoints import Checkpoints, TrainState
from dist_tl.train.engine import Engine
from dist_tl.train.feeds import Batch, Feed
from dist_tl.train.objectives import Figures, Objective

OnProgress = Callable[[int, float, int | None], None]


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
    """Trains from `state` until `num_steps` optimizer steps are done; returns the final state.

    Resuming from a checkpoint gives bit for bit the same weights as an uninterrupted run.

    Raises:
        ShardTimeoutError: a shard was not committed within the timeout of the stream.
        NonFiniteLossError: the loss is NaN or infinite.
        NumericsError: a weight is NaN or infinite. Such weights are never checkpointed.
    """
    steps = feed.read_from(state.cursor)
    while state.step < num_steps:
        micro_batches = next(steps)
        parts = [_micro_step(engine, objective, batch, state.step) for batch in micro_batches]
        state = state.advance()
        record.add(state.step, parts, feed.seconds_starved)
        if checkpoints.is_due(state.step) and state.step < num_steps:
            record.settle(engine)
            checkpoints.save(engine, state, record.stored())
    record.settle(engine)
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
    """Records the loss of every step, averaged over the ranks every `every` steps.

    One collective for many steps keeps logging off the critical path. All ranks see a non-finite
    loss in the same collective, so all of them stop. The loss of the first step is checked at
    once. `flush` and `settle` are collectives.

    Args:
        metrics: log of the rows on one rank; None on the others.
        started: Unix time at which the stage started, minus the seconds of earlier attempts.
        position: returns the lowest shard that this rank still needs; None if it reads no shards.
        on_progress: called with the number of finished steps, the latest known loss and the
            position: on every flush, and whenever the position changes, since generators wait
            for it.
    """

    def __init__(
        self,
        metrics: MetricsLog | None,
        *,
        stage: str,
        every: int,
        started: float,
        position: Callable[[], int | None] = lambda: None,
        on_progress: OnProgress = lambda step, loss, shard: None,
    ) -> None:
        self._metrics, self._stage, self._every = metrics, stage, every
        self.started, self._position, self._on_progress = started, position, on_progress
        self._rows: list[_Row] = []
        self._reported_position = position()
        self.first_step_at: float | None = None
        self.last_loss = float("nan")

    def add(
        self, step: int, parts: Sequence[tuple[Tensor, Figures]], seconds_starved: float
    ) -> None:
        """Records the micro-batches of one optimizer step."""
        now = time.time()
        self.first_step_at = self.first_step_at or now
        self._rows.append(_Row(step, now, _mean_figures(parts), seconds_starved))
        is_first = math.isnan(self.last_loss)
        if is_first or len(self._rows) >= self._every:
            self.flush()
        elif self._position() != self._reported_position:
            self._report(step)

    def flush(self) -> None:
        """Averages the pending rows over the ranks, checks and logs them.

        Raises:
            NonFiniteLossError: on every rank; names the first step with a non-finite loss.
        """
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        table = torch.stack([torch.stack(list(row.figures.values())) for row in rows])
        dist.all_reduce(table)
        means = (table / dist.get_world_size()).cpu().tolist()
        for row, values in zip(rows, means, strict=True):
            self._log(row, dict(zip(row.figures, values, strict=True)))
        self._report(rows[-1].step)

    def settle(self, engine: Engine) -> None:
        """Flushes, stores all rows, and checks that the weights are finite, before a checkpoint.

        Raises:
            NonFiniteLossError: a loss since the last flush is not finite.
            NumericsError: a weight is not finite, although all losses are.
        """
        self.flush()
        self._store()
        if not engine.is_finite():
            raise NumericsError(
                f"stage {self._stage}: step {engine.num_updates} left weights that are NaN or "
                "infinite; lower the learning rate"
            )

    def stored(self) -> bytes:
        """Returns the rows so far as JSON lines; nothing on ranks without a log."""
        return b"" if self._metrics is None else self._metrics.text()

    def _log(self, row: "_Row", figures: dict[str, float]) -> None:
        if not math.isfinite(figures["loss"]):
            self._store()  # keeps the rows before the failure for diagnosis
            raise NonFiniteLossError(
                f"stage {self._stage}: the loss is {figures['loss']} at step {row.step}; lower the "
                "learning rate, or check the batch of that step"
            )
        self.last_loss = figures["loss"]
        if self._metrics is not None:
            self._metrics.log(
                step=row.step,
                **figures,
                elapsed_s=round(row.at - self.started, 3),
                starved_s=round(row.seconds_starved, 3),
            )

    def _store(self) -> None:
        if self._metrics is not None:
            self._metrics.flush()

    def _report(self, step: int) -> None:
        self._reported_position = self._position()
        self._on_progress(step, self.last_loss, self._reported_position)


class _Row(NamedTuple):
    step: int
    at: float  # Unix time
    figures: Figures
    seconds_starved: float


def _mean_figures(parts: Sequence[tuple[Tensor, Figures]]) -> Figures:
    rows = [{"loss": loss.float(), **figures} for loss, figures in parts]
    return {name: torch.stack([row[name].float() for row in rows]).mean() for name in rows[0]}


def read_rows(data: bytes | None) -> list[dict[str, Any]]:
    """Returns the rows of a metrics.jsonl; an empty list if there is no file."""
    return [json.loads(line) for line in (data or b"").splitlines() if line.strip()]
