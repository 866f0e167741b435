"""Metadata of shards: one manifest per stage, one entry per shard. The entry is the commit.

A shard exists only if it has an entry: the tar is written first. Both are plain JSON.
"""

import json
from typing import Any

from pydantic import Field

from dist_tl.config import Model, StrictModel, differing_fields, fingerprint, validate
from dist_tl.errors import ConfigError, DamagedShardError, ShardError
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.layout import (
    entries_prefix,
    entry_key,
    manifest_key,
    marker_of,
    parse_shard_index,
)
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.records import unseal, write_record

FORMAT_VERSION = 1


class StageManifest(StrictModel):
    """Properties that all shards of a stage share; written once, before the first shard."""

    format_version: int = Field(
        default=FORMAT_VERSION, description="Format version of the shards and this file."
    )
    plan: ShardPlan
    kind: str = Field(description='Use of the samples, e.g. "pp" or "p_ssl".')
    condition: str = Field(description='Source of the conditions, e.g. "soft" or "uniform".')
    image_shape: tuple[int, int, int] = Field(description="Channels, height, width.")
    num_classes: int = Field(ge=1, description="Number of source classes, length of a condition.")
    generator: str = Field(description="Fingerprint of the generator.")
    created_by: dict[str, str] = Field(
        default_factory=dict, description="Software versions; ignored in comparisons."
    )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change if any field except `created_by` changes."""
        return fingerprint(self._compared_fields())

    def _compared_fields(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"created_by"})


class ShardEntry(StrictModel):
    """Commit of one shard: the expected tar, and how it was generated."""

    index: int = Field(ge=0)
    key: str = Field(description="Key of the tar in the run's store.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of the tar.")
    bytes: int = Field(ge=0, description="Size of the tar in bytes.")
    samples: int = Field(ge=1, description="Number of samples in the tar.")
    order: str = Field(description="Digest of the shard's order.")
    seconds: float = Field(ge=0, description="Wall-clock seconds from order to commit.")
    host: str = Field(description="Host that generated the shard.")
    committed_at: float = Field(description="Unix time of the commit, seconds.")
    attempt: int = Field(default=0, ge=0, description="Number of earlier attempts, if known.")


def open_stage(store: ObjectStore, manifest: StageManifest) -> StageManifest:
    """Writes the manifest of a stage unless it exists. Returns the stored manifest.

    Raises:
        ConfigError: the stage holds samples of another plan, generator or shape.
    """
    key = manifest_key(manifest.plan.stage)
    if store.read_or_none(key) is None:
        write_record(store, key, manifest, create_only=True)
    # Read again in both cases: another process may have written it first.
    stored = read_manifest(store, manifest.plan.stage)
    if stored is None:
        raise ShardError(f"{key} disappeared during the write; is the run being deleted?")
    differing = differing_fields(stored._compared_fields(), manifest._compared_fields())
    if differing:
        raise ConfigError(
            f"stage {manifest.plan.stage!r} already holds other samples: {', '.join(differing)} "
            f"differ; use another run folder, or delete the stage"
        )
    return stored


def read_manifest(store: ObjectStore, stage: str) -> StageManifest | None:
    """Returns the manifest of a stage, or None if the stage has not started.

    Raises:
        DamagedShardError: it is not the manifest that was written.
        ShardError: it has an unsupported format version.
    """
    return _read(store, manifest_key(stage), StageManifest, version=FORMAT_VERSION)


def read_entry(store: ObjectStore, stage: str, index: int) -> ShardEntry | None:
    """Returns the entry of a shard, or None if the shard is not committed yet.

    Raises:
        DamagedShardError: it is not the entry that was written.
    """
    return _read(store, entry_key(stage, index), ShardEntry)


def check_entry(entry: ShardEntry, plan: ShardPlan) -> ShardEntry:
    """Returns `entry` if it matches the order in `plan`.

    Raises:
        ShardError: it was made for another order.
    """
    order = plan.order(entry.index)
    if entry.order != order.digest or entry.samples != order.num_samples:
        raise ShardError(
            f"shard {entry.index} of stage {plan.stage!r} was made for another order "
            f"({entry.order}, {entry.samples} samples) than this job's ({order.digest}, "
            f"{order.num_samples}); "
            f"delete the stage, or use another run folder"
        )
    return entry


def committed_indices(store: ObjectStore, stage: str) -> set[int]:
    """Returns the indices of a stage's committed shards. Lists keys: slow."""
    indices = map(parse_shard_index, store.list(entries_prefix(stage)))
    return {index for index in indices if index is not None}


def _read(
    store: ObjectStore, key: str, model: type[Model], *, version: int | None = None
) -> Model | None:
    data = store.read_or_none(key)
    if data is None:
        return None
    try:
        fields = json.loads(unseal(data))
    except ValueError as error:
        problem = f"{key} is damaged: {error}; start the same job again, which makes it again"
        raise DamagedShardError.of(problem, marker_of(key)) from None
    if version is not None and fields.get("format_version") != version:
        raise ShardError(
            f"{key} has format {fields.get('format_version')!r}, this version reads {version}; use "
            "the version of dist_tl that wrote it"
        )
    try:
        return validate(model, fields, source=key)
    except ConfigError as error:
        raise ShardError(f"{error}; another version of dist_tl wrote it: use that one") from None
