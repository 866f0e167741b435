"""The training loop and its record: means over ranks, non-finite losses, checkpoints."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from dist_tl.errors import NonFiniteLossError, NumericsError
from dist_tl.telemetry import MetricsLog
from dist_tl.train.checkpoints import TrainState
from dist_tl.train.loop import StepRecord, fit, read_rows


class Sink:
    """Keeps the stored metric rows in memory."""

    data = b""

    def __call__(self, data):
        self.data = data

    @property
    def rows(self):
        return read_rows(self.data)


@pytest.fixture
def sink(alone):
    return Sink()


def record_into(sink, *, every=4, **fields):
    metrics = MetricsLog(sink, flush_every_s=1e9)
    return StepRecord(metrics, stage="pp-seed1", every=every, started=0.0, **fields)


def part(loss, **figures):
    return torch.tensor(loss), {name: torch.tensor(value) for name, value in figures.items()}


FINITE = SimpleNamespace(is_finite=lambda: True, num_updates=1)


def test_every_step_has_a_row_with_the_mean_of_its_micro_batches(sink):
    record = record_into(sink)
    for step in range(1, 8):
        record.add(step, [part(float(step), kept=0.0), part(step + 1.0, kept=1.0)], 0.25)
    record.settle(FINITE)
    assert [row["step"] for row in sink.rows] == list(range(1, 8))
    assert [row["loss"] for row in sink.rows] == [step + 0.5 for step in range(1, 8)]
    assert {row["kept"] for row in sink.rows} == {0.5}
    assert {row["starved_s"] for row in sink.rows} == {0.25}
    assert record.last_loss == 7.5


def test_rows_hold_the_seconds_since_the_start_of_the_stage(sink, monkeypatch):
    clock = iter([103.0, 104.5])
    record = StepRecord(MetricsLog(sink), stage="s", every=9, started=100.0)
    monkeypatch.setattr("dist_tl.train.loop.time", SimpleNamespace(time=lambda: next(clock)))
    record.add(1, [part(1.0)], 0.0)
    record.add(2, [part(1.0)], 0.0)
    record.settle(FINITE)
    assert [row["elapsed_s"] for row in sink.rows] == [3.0, 4.5]
    assert record.first_step_at == 103.0


def test_settle_stores_all_rows(sink):
    """Otherwise a stage killed after a checkpoint would resume with a gap in its curve."""
    record = record_into(sink, every=100)
    for step in (1, 2, 3):
        record.add(step, [part(1.0)], 0.0)
    assert sink.rows == []
    record.settle(FINITE)
    assert [row["step"] for row in sink.rows] == [1, 2, 3]
    record.settle(FINITE)
    assert len(sink.rows) == 3


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_raises_with_stage_and_step_and_stores_the_rows_before(sink, loss):
    record = record_into(sink)
    for step, value in enumerate([1.0, 2.0, loss, 3.0], start=1):
        record.add(step, [part(value)], 0.0)
    with pytest.raises(NonFiniteLossError, match=f"stage pp-seed1: the loss is {loss} at step 3"):
        record.flush()
    assert [row["loss"] for row in sink.rows] == [1.0, 2.0]


def test_the_first_loss_is_checked_at_once_and_later_ones_together(sink):
    with pytest.raises(NonFiniteLossError, match="step 1"):
        record_into(sink).add(1, [part(math.nan)], 0.0)
    record = record_into(sink, every=3)
    record.add(1, [part(1.0)], 0.0)
    record.add(2, [part(math.nan)], 0.0)
    record.add(3, [part(1.0)], 0.0)
    with pytest.raises(NonFiniteLossError, match="step 2"):
        record.add(4, [part(1.0)], 0.0)


def test_non_finite_weights_are_rejected_before_a_checkpoint(sink):
    record = record_into(sink)
    record.add(6, [part(1.0)], 0.0)
    broken = SimpleNamespace(is_finite=lambda: False, num_updates=6)
    with pytest.raises(NumericsError, match=r"stage pp-seed1: step 6 left weights that are NaN"):
        record.settle(broken)


def test_progress_is_reported_on_every_flush_and_position_change(sink):
    reports, stream = [], SimpleNamespace(shard=0)
    record = record_into(
        sink,
        every=3,
        position=lambda: stream.shard,
        on_progress=lambda *report: reports.append(report),
    )
    for step, shard in enumerate([0, 0, 4, 4, 4, 5, 5], start=1):
        stream.shard = shard
        record.add(step, [part(10.0 * step)], 0.0)
    assert reports == [(1, 10.0, 0), (3, 10.0, 4), (4, 40.0, 4), (6, 40.0, 5), (7, 70.0, 5)]


def diverge_on_rank_one(rank, world_size):
    rows = Sink()
    record = StepRecord(MetricsLog(rows), stage="s", every=2, started=0.0)
    record.add(1, [part(1.0 + 2.0 * rank)], 0.0)
    record.add(2, [part(4.0)], 0.0)
    try:
        record.add(3, [part(math.nan if rank == 1 else 1.0)], 0.0)
    except NonFiniteLossError as error:
        return str(error), [row["loss"] for row in rows.rows]


def test_losses_are_means_over_ranks_and_a_non_finite_one_stops_all_ranks(two_ranks):
    one, two = two_ranks(diverge_on_rank_one)
    assert one == two
    assert "the loss is nan at step 3" in one[0]
    assert one[1] == [2.0, 4.0]


class Recorder:
    """An engine, a feed and checkpoints in one that record their calls."""

    module = None

    def __init__(self, micro_batches=1, every=2):
        self.micro_batches, self.every = micro_batches, every
        self.calls, self.seconds_starved, self.num_updates = [], 0.0, 0

    def read_from(self, cursor):
        while True:
            yield [SimpleNamespace(number=(cursor, part)) for part in range(self.micro_batches)]
            cursor += 1

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def backward(self, loss):
        self.calls.append("backward")

    def step(self):
        self.calls.append("step")

    def is_finite(self):
        return True

    def is_due(self, step):
        return step % self.every == 0

    def save(self, engine, state, metrics):
        self.calls.append(f"save {state.step} at {state.cursor}")

    def objective(self, module, batch, step):
        self.calls.append((step, batch.number))
        return torch.tensor(1.0), {}


def run(recorder, state, num_steps, sink):
    return fit(
        recorder,
        recorder.objective,
        recorder,
        state,
        num_steps=num_steps,
        checkpoints=recorder,
        record=record_into(sink),
    )


def test_every_micro_batch_is_backpropagated_and_the_last_step_is_not_saved(sink):
    recorder = Recorder(micro_batches=2)
    assert run(recorder, TrainState(), 4, sink) == TrainState(4, 4)
    assert [call for call in recorder.calls if isinstance(call, tuple)] == [
        (step, (step, part)) for step in range(4) for part in range(2)
    ]
    assert recorder.calls.count("backward") == recorder.calls.count("step") == 8
    assert [call for call in recorder.calls if "save" in call] == ["save 2 at 2"]


def test_training_resumes_at_the_given_state(sink):
    recorder = Recorder(every=100)
    assert run(recorder, TrainState(3, 5), 5, sink) == TrainState(5, 7)
    assert [c for c in recorder.calls if isinstance(c, tuple)] == [(3, (5, 0)), (4, (6, 0))]
    assert [row["step"] for row in sink.rows] == [4, 5]


def test_a_finished_state_takes_no_step(sink):
    recorder = Recorder()
    assert run(recorder, TrainState(4, 4), 4, sink) == TrainState(4, 4)
    assert recorder.calls == []


def test_a_missing_or_empty_file_has_no_rows():
    assert read_rows(None) == read_rows(b"") == read_rows(b"\n") == []
    assert read_rows(json.dumps({"step": 1}).encode()) == [{"step": 1}]
