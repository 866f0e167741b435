"""What is written about shards: one manifest a stage, one entry a shard. The entry is the commit.

No entry, no shard: the tar is put first. Both are plain JSON.
"""

import json
from collections.abc import Mapping
from typing import Any

from pydantic import Field

from dist_tl.config import Model, StrictModel, differing_fields, fingerprint, validate
from dist_tl.errors import ConfigError, ShardError
from dist_tl.shards.order import ShardPlan
from dist_tl.storage.layout import entries_prefix, entry_key, manifest_key, parse_shard_index
from dist_tl.storage.objects import ObjectStore

FORMAT_VERSION = 1


class StageManifest(StrictModel):
    """What all shards of a stage have in common; written once, before the first of them."""

    format_version: int = Field(
        default=FORMAT_VERSION, description="Of the shards and of this file."
    )
    plan: ShardPlan
    kind: str = Field(description='What the samples are for, e.g. "pp" or "p_ssl".')
    condition: str = Field(description='Where conditions come from, e.g. "soft" or "uniform".')
    image_shape: tuple[int, int, int] = Field(description="Channels, height, width.")
    num_classes: int = Field(ge=1, description="Source classes, the length of a condition.")
    generator: str = Field(description="Fingerprint of the generator that makes the images.")
    created_by: dict[str, str] = Field(
        default_factory=dict, description="Versions of the software; not compared."
    )

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that change when anything but `created_by` changes."""
        return fingerprint(self._compared())

    def _compared(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"created_by"})


class ShardEntry(StrictModel):
    """The commit of one shard: what its tar must be, and how it came to be."""

    index: int = Field(ge=0)
    key: str = Field(description="Key of the tar in the run's store.")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Hash of the whole tar.")
    bytes: int = Field(ge=0, description="Size of the tar.")
    samples: int = Field(ge=1, description="Samples in the tar.")
    order: str = Field(description="Digest of the order that the shard fulfils.")
    seconds: float = Field(ge=0, description="Wall-clock seconds from order to commit.")
    host: str = Field(description="Machine that made the shard.")
    committed_at: float = Field(description="Unix time of the commit, seconds.")
    attempt: int = Field(default=0, ge=0, description="Attempts before this one, where known.")


def open_stage(store: ObjectStore, manifest: StageManifest) -> StageManifest:
    """Write the manifest of a stage, or find it written; return what is stored.

    Raises:
        ConfigError: the stage holds samples of another plan, generator or shape.
    """
    data = manifest.model_dump_json(indent=1).encode()
    key = manifest_key(manifest.plan.stage)
    if store.read_or_none(key) is None:
        store.write(key, data, create_only=True)
    # Read again in either case: somebody else may have been first.
    stored = read_manifest(store, manifest.plan.stage)
    if stored is None:
        raise ShardError(f"{key} vanished while it was written; is something deleting the run?")
    differing = differing_fields(stored._compared(), manifest._compared())
    if differing:
        raise ConfigError(
            f"stage {manifest.plan.stage!r} already holds other samples: {', '.join(differing)} "
            f"differ; use another run folder, or delete the stage"
        )
    return stored


def read_manifest(store: ObjectStore, stage: str) -> StageManifest | None:
    """The manifest of a stage; None where the stage has not begun.

    Raises:
        ShardError: it is damaged, or of a format that this version does not know.
    """
    key = manifest_key(stage)
    data = _read_mapping(store, key)
    if data is not None and data.get("format_version") != FORMAT_VERSION:
        raise ShardError(
            f"{key} has format {data.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}; use the version of dist_tl that wrote it"
        )
    return None if data is None else _as_model(StageManifest, data, key)


def read_entry(store: ObjectStore, stage: str, index: int) -> ShardEntry | None:
    """The entry of a shard; None where the shard is not committed.

    Raises:
        ShardError: the entry is damaged.
    """
    key = entry_key(stage, index)
    data = _read_mapping(store, key)
    return None if data is None else _as_model(ShardEntry, data, key)


def check_entry(entry: ShardEntry, plan: ShardPlan) -> ShardEntry:
    """`entry` itself, if it fulfils its order in `plan`.

    Raises:
        ShardError: it fulfils another order.
    """
    order = plan.order(entry.index)
    if entry.order != order.digest or entry.samples != order.num_samples:
        raise ShardError(
            f"shard {entry.index} of stage {plan.stage!r} fulfils another order ({entry.order}, "
            f"{entry.samples} samples) than this job's ({order.digest}, {order.num_samples}); "
            f"delete the stage, or use another run folder"
        )
    return entry


def committed_indices(store: ObjectStore, stage: str) -> set[int]:
    """Indices of the committed shards of a stage. Lists: for status and repair, not for readers."""
    indices = map(parse_shard_index, store.list(entries_prefix(stage)))
    return {index for index in indices if index is not None}


def _read_mapping(store: ObjectStore, key: str) -> Mapping[str, Any] | None:
    raw = store.read_or_none(key)
    if raw is None:
        return None
    try:
        data = json.loads(raw)
    except ValueError as error:
        raise ShardError(f"{key} is damaged: {error}; delete it to have it made again") from None
    if not isinstance(data, dict):
        raise ShardError(f"{key} is damaged: expected a mapping, got {type(data).__name__}")
    return data


def _as_model(model: type[Model], data: Mapping[str, Any], key: str) -> Model:
    try:
        return validate(model, data, source=key)
    except ConfigError as error:
        raise ShardError(f"{error}; delete it to have it made again") from None
