"""Keys of all objects that a run writes, relative to the run's folder, and their parsers.

Not covered: the contents of the objects, which belong to the modules that write them.
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
_ATTEMPT = re.compile(r"attempts/(\d{6,})-[0-9a-f]+\.json")
_STAGE = re.compile(r"stages/[^/]+")
_CHECKPOINT = re.compile(r"stages/[^/]+/checkpoints/step-\d{8,}")
_RANK = re.compile(r"(?:.*/)?rank-(\d{5,})\.(?:safetensors|json)")


def check_name(name: str) -> str:
    """Returns `name` if it is a valid name of a stage or an arm.

    Raises:
        ValueError: it is empty, longer than 80 characters, starts with a dot, or contains
            characters other than letters, digits, "-", "_" and ".".
    """
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"expected a name of 1 to 80 letters, digits, '-', '_' or '.' that does not start with "
            f"'.', got {name!r}"
        )
    return name


def _check_count(field: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"expected a {field} of 0 or more, got {value}")
    return value


def stage_prefix(stage: str) -> str:
    """Returns the folder of one generate or train stage of the job."""
    return f"stages/{check_name(stage)}"


def shard_key(stage: str, index: int) -> str:
    """Returns the key of the tar of shard `index`."""
    return f"{stage_prefix(stage)}/shards/{_check_count('shard index', index):06d}.tar"


def entries_prefix(stage: str) -> str:
    """Returns the folder that holds one entry per committed shard."""
    return f"{stage_prefix(stage)}/entries"


def entry_key(stage: str, index: int) -> str:
    """Returns the key of the entry that commits shard `index`."""
    return f"{entries_prefix(stage)}/{_check_count('shard index', index):06d}.json"


def manifest_key(stage: str) -> str:
    """Returns the key of the manifest, which describes all shards of the stage."""
    return f"{stage_prefix(stage)}/manifest.json"


def conditions_key(stage: str) -> str:
    """Returns the key of the probability vectors that the stage's generators sample from."""
    return f"{stage_prefix(stage)}/conditions.safetensors"


def metrics_key(stage: str) -> str:
    """Returns the key of the metrics, JSON lines that are written while the stage runs."""
    return f"{stage_prefix(stage)}/metrics.jsonl"


def result_key(stage: str) -> str:
    """Returns the key of the stage's result; the stage is done if this object exists."""
    return f"{stage_prefix(stage)}/result.json"


def stage_model_prefix(stage: str) -> str:
    """Returns the folder of the model that the stage passes to the next stage."""
    return f"{stage_prefix(stage)}/model"


def checkpoints_prefix(stage: str) -> str:
    """Returns the folder of all checkpoints of the stage."""
    return f"{stage_prefix(stage)}/checkpoints"


def checkpoint_prefix(stage: str, step: int) -> str:
    """Returns the folder of the checkpoint after `step` optimizer steps."""
    return f"{checkpoints_prefix(stage)}/step-{_check_count('step', step):08d}"


def rank_tensors_key(stage: str, step: int, rank: int, attempt: int = 0) -> str:
    """Returns the key of the tensors of one rank in a checkpoint."""
    return f"{_rank_key(stage, step, rank, attempt)}.safetensors"


def rank_state_key(stage: str, step: int, rank: int, attempt: int = 0) -> str:
    """Returns the key of the non-tensor state of one rank in a checkpoint."""
    return f"{_rank_key(stage, step, rank, attempt)}.json"


def checkpoint_metrics_key(stage: str, step: int, attempt: int = 0) -> str:
    """Returns the key of the metrics up to a checkpoint."""
    return f"{_files_prefix(stage, step, attempt)}/metrics.jsonl"


def _rank_key(stage: str, step: int, rank: int, attempt: int) -> str:
    return f"{_files_prefix(stage, step, attempt)}/rank-{_check_count('rank', rank):05d}"


def _files_prefix(stage: str, step: int, attempt: int) -> str:
    # Attempts of a run may overlap briefly: each writes its own files.
    folder = f"/attempt-{_check_count('attempt', attempt):06d}" if attempt else ""
    return f"{checkpoint_prefix(stage, step)}{folder}"


def attempt_key(number: int, token: str) -> str:
    """Returns the key of the record of one attempt of the run; `token` is its random hex string."""
    return f"{ATTEMPTS}/{_check_count('attempt', number):06d}-{token}.json"


def parse_attempt(key: str) -> int | None:
    """Returns the number of an attempt's key, or None for any other key."""
    match = _ATTEMPT.fullmatch(key)
    return int(match[1]) if match else None


def input_key(digest: str) -> str:
    """Returns the key of the manifest of an input of the run."""
    return f"inputs/{digest}.json"


def commit_key(stage: str, step: int) -> str:
    """Returns the key of the marker that commits a checkpoint."""
    return f"{checkpoint_prefix(stage, step)}/COMMIT"


def model_prefix(arm: str, seed: int) -> str:
    """Returns the folder of the final model of one arm and seed."""
    return f"models/{check_name(arm)}-seed{_check_count('seed', seed)}"


def parse_shard_index(key: str) -> int | None:
    """Returns the index of a shard's or entry's key, or None for any other key."""
    match = _SHARD_OR_ENTRY.fullmatch(key)
    return int(match[1] or match[2]) if match else None


def parse_checkpoint_step(key: str) -> int | None:
    """Returns the step of a checkpoint's folder or of a key inside it, or None for other keys."""
    match = _STEP.fullmatch(key)
    return int(match[1]) if match else None


def parse_rank(key: str) -> int | None:
    """Returns the rank of a rank's checkpoint file, or None for any other key."""
    match = _RANK.fullmatch(key)
    return int(match[1]) if match else None


def marker_of(key: str) -> str:
    """Returns the key of the marker that commits an object: without it, the object is made again.

    E.g. the entry of a shard, COMMIT of a checkpoint's file, the result of a stage's model.
    """
    if (index := parse_shard_index(key)) is not None:
        return f"{key.rsplit('/', 2)[0]}/entries/{index:06d}.json"
    if match := _CHECKPOINT.match(key):
        return f"{match[0]}/COMMIT"
    if match := _STAGE.match(key):
        is_input = key.endswith(("/manifest.json", "/conditions.safetensors"))
        return f"{match[0]}/{'manifest' if is_input else 'result'}.json"
    return RESULTS if key in (GALLERY, REPORT) or key.startswith("models/") else key
