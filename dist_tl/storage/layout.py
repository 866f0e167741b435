"""The key of everything that a run writes, relative to the run's folder, and the way back.

Not covered: what the objects hold. That belongs to whoever writes them.
"""

import re

JOB = "job.json"
RESULTS = "results.json"
REPORT = "report.html"
GALLERY = "gallery.safetensors"
ATTEMPTS = "attempts"
SCALE = "scale.json"
SUBMISSION = "submission.json"

MODEL_TENSORS = "model.safetensors"
MODEL_CONFIG = "config.json"
MODEL_CARD = "README.md"

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}")
_SHARD_OR_ENTRY = re.compile(r"(?:.*/)?(?:shards/(\d{6,})\.tar|entries/(\d{6,})\.json)")
_STEP = re.compile(r"(?:.*/)?step-(\d{8,})(?:/.*)?")
_ATTEMPT = re.compile(r"attempts/(\d{6,})\.json")
_RANK = re.compile(r"(?:.*/)?rank-(\d{5,})\.(?:safetensors|json)")


def check_name(name: str) -> str:
    """`name` itself, if it can be the name of a stage or an arm.

    Raises:
        ValueError: it is empty, longer than 80 characters, starts with a dot, or holds anything
            but letters, digits, "-", "_" and ".".
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"expected a name of 1 to 80 letters, digits, '-', '_' or '.' that does not start with "
            f"'.', got {name!r}"
        )
    return name


def _count(what: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"expected a {what} of 0 or more, got {value}")
    return value


def stage_prefix(stage: str) -> str:
    """The folder of one generate or train step of the job."""
    return f"stages/{check_name(stage)}"


def shard_key(stage: str, index: int) -> str:
    """The tar of shard `index`."""
    return f"{stage_prefix(stage)}/shards/{_count('shard index', index):06d}.tar"


def entries_prefix(stage: str) -> str:
    """The folder that holds one entry for every committed shard."""
    return f"{stage_prefix(stage)}/entries"


def entry_key(stage: str, index: int) -> str:
    """The entry that makes shard `index` exist."""
    return f"{entries_prefix(stage)}/{_count('shard index', index):06d}.json"


def manifest_key(stage: str) -> str:
    """What all shards of the stage have in common."""
    return f"{stage_prefix(stage)}/manifest.json"


def conditions_key(stage: str) -> str:
    """The probability vectors that the stage's generators draw from."""
    return f"{stage_prefix(stage)}/conditions.safetensors"


def metrics_key(stage: str) -> str:
    """One JSON row a line, written while the stage runs."""
    return f"{stage_prefix(stage)}/metrics.jsonl"


def result_key(stage: str) -> str:
    """What the stage came to; its presence means that the stage is done."""
    return f"{stage_prefix(stage)}/result.json"


def stage_model_prefix(stage: str) -> str:
    """The folder of the model that the stage hands to the next one."""
    return f"{stage_prefix(stage)}/model"


def checkpoints_prefix(stage: str) -> str:
    """The folder of all checkpoints of the stage."""
    return f"{stage_prefix(stage)}/checkpoints"


def checkpoint_prefix(stage: str, step: int) -> str:
    """The folder of the checkpoint after `step` optimizer steps."""
    return f"{checkpoints_prefix(stage)}/step-{_count('step', step):08d}"


def rank_tensors_key(stage: str, step: int, rank: int, attempt: int = 0) -> str:
    """The tensors that one rank put into a checkpoint."""
    return f"{_rank_key(stage, step, rank, attempt)}.safetensors"


def rank_state_key(stage: str, step: int, rank: int, attempt: int = 0) -> str:
    """The plain values that one rank put into a checkpoint."""
    return f"{_rank_key(stage, step, rank, attempt)}.json"


def _rank_key(stage: str, step: int, rank: int, attempt: int) -> str:
    # Attempts at a run may overlap for moments: each has files of its own.
    folder = f"attempt-{_count('attempt', attempt):06d}/" if attempt else ""
    return f"{checkpoint_prefix(stage, step)}/{folder}rank-{_count('rank', rank):05d}"


def attempt_key(number: int) -> str:
    """The record of one start of the run."""
    return f"{ATTEMPTS}/{_count('attempt', number):06d}.json"


def parse_attempt(key: str) -> int | None:
    """The number in the key of an attempt; None for any other key."""
    match = _ATTEMPT.fullmatch(key)
    return int(match[1]) if match else None


def commit_key(stage: str, step: int) -> str:
    """The marker that makes a checkpoint exist."""
    return f"{checkpoint_prefix(stage, step)}/COMMIT"


def model_prefix(arm: str, seed: int) -> str:
    """The folder of the final model of one arm and seed."""
    return f"models/{check_name(arm)}-seed{_count('seed', seed)}"


def parse_shard_index(key: str) -> int | None:
    """The index in the key of a shard or an entry; None for any other key."""
    match = _SHARD_OR_ENTRY.fullmatch(key)
    return int(match[1] or match[2]) if match else None


def parse_checkpoint_step(key: str) -> int | None:
    """The step in a checkpoint's folder or any key inside it; None for any other key."""
    match = _STEP.fullmatch(key)
    return int(match[1]) if match else None


def parse_rank(key: str) -> int | None:
    """The rank in the key of a rank's part of a checkpoint; None for any other key."""
    match = _RANK.fullmatch(key)
    return int(match[1]) if match else None
