"""Sharded checkpoints: every rank writes its own files; COMMIT is written last.

A checkpoint is a folder with two files per rank (tensors, and the slices that they hold), the
metrics so far, and COMMIT, which lists every file with its digest. Without COMMIT a checkpoint does
not exist: `restore` ignores it and the next `save` removes it. A damaged checkpoint is removed, and
the one before is restored.

Restoring at another world size is not supported and raises an error.
"""

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch.distributed as dist
from pydantic import Field
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.errors import CheckpointError, CheckpointMismatchError, ConfigError, DamagedError
from dist_tl.storage import layout
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import parse_record, write_record
from dist_tl.train.engine import Engine

FORMAT = 1
Item = TypeVar("Item")
logger = logging.getLogger(__name__)


class CheckpointConfig(StrictModel):
    """When a stage saves checkpoints, and how many it keeps."""

    every_steps: int = Field(
        default=500, ge=0, description="Optimizer steps between checkpoints; 0 disables them."
    )
    keep: int = Field(
        default=2, ge=1, description="Committed checkpoints to keep while a stage trains."
    )


class FileRecord(StrictModel):
    """One file of a checkpoint."""

    key: str
    sha256: str
    bytes: int


class Commit(StrictModel):
    """The content of COMMIT, the marker of a complete checkpoint."""

    format: Literal[1] = FORMAT
    step: int = Field(description="Number of finished optimizer steps.")
    cursor: int = Field(description="Number of consumed global batches.")
    world_size: int
    attempt: int = Field(default=0, description="Number of the attempt; 0 if not counted.")
    fingerprint: str = Field(description="Fingerprint of the stage specification.")
    files: tuple[FileRecord, ...]


@dataclass(frozen=True)
class TrainState:
    """Progress of a training run: finished optimizer steps and consumed global batches."""

    step: int = 0
    cursor: int = 0

    def advance(self) -> "TrainState":
        """Returns the state after one more step and global batch."""
        return TrainState(self.step + 1, self.cursor + 1)


class _Damage(Exception):
    """A file of a checkpoint is not the one that COMMIT lists."""


class Checkpoints:
    """The checkpoints of one stage on one rank. `save` and `restore` are collectives."""

    def __init__(
        self,
        store: ObjectStore,
        stage: str,
        config: CheckpointConfig,
        *,
        fingerprint: str,
        rank: int,
        world_size: int,
        attempt: Attempt | None = None,
    ) -> None:
        self._store, self._stage, self._config = store, stage, config
        self._attempt = attempt
        self._fingerprint, self._rank, self._world_size = fingerprint, rank, world_size
        self.seconds_blocked = 0.0
        self.restored_metrics = b""
        self.notes: list[str] = []  # damage that `restore` found

    def is_due(self, step: int) -> bool:
        """Whether to save a checkpoint after optimizer step `step`."""
        return self._config.every_steps > 0 and step % self._config.every_steps == 0

    def save(self, engine: Engine, state: TrainState, metrics: bytes = b"") -> None:
        """Saves the engine and `state`; returns on every rank once the checkpoint is committed.

        Args:
            metrics: content of metrics.jsonl up to this step; of rank 0 only.

        Raises:
            StorageError: writing a file failed; nothing is committed.
            SupersededError: a later attempt owns the run; nothing is committed.
        """
        started = time.monotonic()
        records = self._gather(self._write_own_files(engine, state.step, metrics))
        if self._rank == 0:
            self._commit(state, records)
        dist.barrier()
        self.seconds_blocked += time.monotonic() - started

    def restore(self, engine: Engine) -> TrainState:
        """Restores the latest undamaged checkpoint; returns a new state if there is none.

        Also sets `restored_metrics` on rank 0. Damaged checkpoints are removed.

        Raises:
            CheckpointMismatchError: the stage, the world size or the sharding of the parameters
                differs.
        """
        while (commit := self._latest()) is not None:
            self._check_matches(commit)
            problem, own = "", None
            try:
                own = self._read_own_files(engine, commit)
            except _Damage as damage:
                problem = str(damage)
            problems = [found for found in self._gather([problem]) if found]
            if not problems:
                assert own is not None, "this rank found no problem"
                # Not before all ranks have their files: a dropped checkpoint leaves no metrics.
                tensors, self.restored_metrics = own
                engine.load_local_state(tensors, num_updates=commit.step)
                return TrainState(commit.step, commit.cursor)
            self._drop(commit.step, problems[0])
        return TrainState()

    def _check_matches(self, commit: Commit) -> None:
        if commit.fingerprint != self._fingerprint:
            raise CheckpointMismatchError(
                f"stage {self._stage}: another job made the checkpoint at step {commit.step} "
                f"({commit.fingerprint}, this one is {self._fingerprint}); use another run name"
            )
        if commit.world_size != self._world_size:
            raise CheckpointMismatchError(
                f"stage {self._stage}: the checkpoint at step {commit.step} was made by "
                f"{commit.world_size} workers, this job has {self._world_size}; "
                f"resume with trainers.workers={commit.world_size}, or use another run name"
            )

    def _read_own_files(self, engine: Engine, commit: Commit) -> tuple[dict[str, Tensor], bytes]:
        """Returns the tensors of this rank, and on rank 0 the metrics."""
        key_parts = (self._stage, commit.step, self._rank, commit.attempt)
        state = self._read(layout.rank_state_key(*key_parts), commit)
        tensors = self._read(layout.rank_tensors_key(*key_parts), commit)
        if json.loads(state)["slices"] != _slices(engine):
            raise CheckpointMismatchError(
                f"{layout.rank_state_key(*key_parts)}: the parameters are sharded differently in "
                "this job; another version of the software made the checkpoint: use that version, "
                "or another run name"
            )
        metrics_key = layout.checkpoint_metrics_key(self._stage, commit.step, commit.attempt)
        metrics = self._read(metrics_key, commit) if self._rank == 0 else b""
        return load_tensors(tensors), metrics

    def _drop(self, step: int, problem: str) -> None:
        """Removes a damaged checkpoint. Every rank waits until it is gone."""
        note = f"stage {self._stage}: {problem}; the checkpoint at step {step} is removed"
        logger.warning(note)
        self.notes.append(note)
        if self._rank == 0:
            self._remove(step)
        dist.barrier()

    def clear(self) -> None:
        """Removes all checkpoints, once the result of the stage is stored."""
        if self._rank == 0:
            remove_checkpoints(self._store, self._stage)

    def _write_own_files(self, engine: Engine, step: int, metrics: bytes) -> list[FileRecord]:
        tensors = save_tensors(engine.local_state())
        slices = json.dumps({"format": FORMAT, "slices": _slices(engine)}, sort_keys=True)
        key_parts = (self._stage, step, self._rank, self._number)
        files = {
            layout.rank_tensors_key(*key_parts): tensors,
            layout.rank_state_key(*key_parts): slices.encode(),
        }
        if self._rank == 0:
            files[layout.checkpoint_metrics_key(self._stage, step, self._number)] = metrics
        return [self._write(key, data) for key, data in files.items()]

    @property
    def _number(self) -> int:
        return self._attempt.number if self._attempt else 0

    def _write(self, key: str, data: bytes) -> FileRecord:
        self._store.write(key, data)
        return FileRecord(key=key, sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))

    def _gather(self, own: Sequence[Item]) -> list[Item]:
        """Returns the items of all ranks, in the order of the ranks."""
        gathered: list[Any] = [None] * self._world_size
        dist.all_gather_object(gathered, list(own))
        return [item for part in gathered for item in part]

    def _commit(self, state: TrainState, records: Sequence[FileRecord]) -> None:
        if self._attempt is not None:
            self._attempt.check()
        commit = Commit(
            attempt=self._number,
            step=state.step,
            cursor=state.cursor,
            world_size=self._world_size,
            fingerprint=self._fingerprint,
            files=tuple(records),
        )
        write_record(self._store, self._commit_key(state.step), commit)
        logger.info("stage %s: checkpoint at step %d committed", self._stage, state.step)
        # Also removes uncommitted files of earlier attempts; files of later steps cannot exist yet.
        committed = [step for step in self._steps() if self._is_committed(step)]
        kept = committed[-self._config.keep :]
        for step in self._steps():
            if step not in kept:
                self._remove(step)

    def _latest(self) -> Commit | None:
        """Reads COMMIT on rank 0 only, so all ranks restore the same checkpoint or all raise."""
        payload: list[Any] = [None, 0, b""]
        if self._rank == 0:
            steps = [step for step in self._steps() if self._is_committed(step)]
            if steps:
                key = self._commit_key(steps[-1])
                payload = [key, steps[-1], self._store.read(key)]
        dist.broadcast_object_list(payload, src=0)
        key, step, data = payload
        if key is None:
            return None
        try:
            return parse_record(data, key, Commit, remedy="the one before is used")
        except DamagedError as damage:
            self._drop(step, str(damage))
            return self._latest()
        except ConfigError as error:
            raise CheckpointError(str(error)) from None

    def _read(self, key: str, commit: Commit) -> bytes:
        """Reads a file of the checkpoint and verifies its digest."""
        digests = {record.key: record.sha256 for record in commit.files}
        data = self._store.read_or_none(key)
        if data is None:
            raise _Damage(f"{key} is missing")
        if hashlib.sha256(data).hexdigest() != digests.get(key):
            raise _Damage(f"{key} is not the committed file")
        return data

    def _steps(self) -> list[int]:
        keys = self._store.list(layout.checkpoints_prefix(self._stage))
        steps = {layout.parse_checkpoint_step(key) for key in keys}
        return sorted(step for step in steps if step is not None)

    def _is_committed(self, step: int) -> bool:
        return self._store.exists(self._commit_key(step))

    def _remove(self, step: int) -> None:
        self._store.delete(self._commit_key(step))
        self._store.delete_all(layout.checkpoint_prefix(self._stage, step) + "/")

    def _commit_key(self, step: int) -> str:
        return layout.commit_key(self._stage, step)


def remove_checkpoints(store: ObjectStore, stage: str) -> None:
    """Removes all checkpoints of a stage, each COMMIT before the files that it lists."""
    prefix = layout.checkpoints_prefix(stage)
    for step in {layout.parse_checkpoint_step(key) for key in store.list(prefix)}:
        if step is not None:
            store.delete(layout.commit_key(stage, step))
    store.delete_all(prefix)


def _slices(engine: Engine) -> dict[str, Any]:
    """Returns shape, offset and length of this rank's slice of each parameter."""
    return {
        f.name: {"shape": list(f.shape), "offset": f.offset, "length": f.master.numel()}
        for f in engine.fragments
    }
