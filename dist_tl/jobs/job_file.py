"""Job files: read, changed by overrides, and checked. Imports neither ray nor deepspeed."""

from collections.abc import Sequence
from pathlib import Path

from dist_tl.config import apply_overrides, parse_yaml, validate
from dist_tl.errors import ConfigError
from dist_tl.jobs.forecast.spec import ForecastJob
from dist_tl.jobs.geometric_labels.spec import GeometricLabelsJob
from dist_tl.jobs.hub.spec import HubJob
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.manifold.spec import ManifoldJob
from dist_tl.jobs.predict.spec import PredictJob
from dist_tl.jobs.transfer.spec import SourceJob, TransferJob

Job = (
    SourceJob
    | TransferJob
    | HubJob
    | ManifoldJob
    | ForecastJob
    | LayerSearchJob
    | GeometricLabelsJob
    | PredictJob
)
KINDS: dict[str, type[Job]] = {
    "source": SourceJob,
    "transfer": TransferJob,
    "hub": HubJob,
    "predict": PredictJob,
    "manifold": ManifoldJob,
    "forecast": ForecastJob,
    "layer_search": LayerSearchJob,
    "geometric_labels": GeometricLabelsJob,
}

# What may change between two starts of one run: it decides how fast results come, not which; but
# for `degrade`, whose effects are marked sample by sample.
MAY_CHANGE = (
    *("generators", "experts", "degrade", "trials"),
    *("session", "checkpoints", "trainers", "store"),
)


def read_job(path: str | Path, overrides: Sequence[str] = ()) -> Job:
    """A job file with overrides.

    Raises:
        ConfigError: the file is missing or says something that a job cannot say.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read the job file {path}: {error.strerror}") from None
    data = apply_overrides(parse_yaml(text, source=str(path)), overrides)
    kind = data.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"{path}: kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    return validate(KINDS[kind], data, source=str(path))
