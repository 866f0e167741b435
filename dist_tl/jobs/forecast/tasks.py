"""The Ray task of a forecast: the learning curve of one feature map, and its checks."""

import time

import numpy as np
import torch
from pydantic import Field

from dist_tl.config import StrictModel
from dist_tl.datasets.images import LabelledImages
from dist_tl.errors import ConfigError
from dist_tl.jobs.forecast.plan import MapInputs
from dist_tl.jobs.forecast.spec import ForecastJob, MapConfig, NetworkMap, PixelMap
from dist_tl.jobs.stages import drawn_items
from dist_tl.jobs.teacher import teacher_location
from dist_tl.methods.hidden_manifold.feature_maps import pooled_block, random_map
from dist_tl.methods.hidden_manifold.forecast import Array, forecast_curve, principal_components
from dist_tl.methods.hidden_manifold.forecast_checks import (
    Check,
    CurvePoint,
    check_curve,
    points_of,
)
from dist_tl.seeds import numpy_rng, torch_rng
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import RowsSpec, load_rows

BATCH = 512


class MapOutput(StrictModel):
    """The forecast of one feature map."""

    num_features: int
    curve: tuple[CurvePoint, ...]
    checks: tuple[Check, ...] = Field(description="With the labels used by the forecast.")
    verification: tuple[Check, ...] = Field(description="With all labels of the data.")
    seconds: float


def forecast_map(inputs: MapInputs, store: ObjectStore) -> MapOutput:
    """Forecasts the learning curve of one map and checks it on held-out labels."""
    began, job = time.monotonic(), inputs.job
    rows = load_rows(RowsSpec(data=job.data))
    features_NF = _map_features(job, job.maps[inputs.index], rows, store)
    features_NK = principal_components(features_NF, job.components).apply(features_NF)
    drawn = drawn_items(job, rows)
    order = numpy_rng(job.seed, "forecast labels").permutation(len(drawn))
    kept = drawn[order[: job.labelled]]
    curve = forecast_curve(
        features_NK,
        features_NK[kept],
        rows.labels[kept],
        num_classes=rows.num_classes,
        sizes=job.sizes,
        lams=job.lambdas,
        num_bootstrap=job.bootstrap,
        rng=numpy_rng(job.seed, "forecast bootstrap"),
    )
    verified = [size for size in job.sizes if job.verify and size <= len(drawn) // 2]
    checks, verification = (
        check_curve(
            curve,
            features_NK[items],
            rows.labels[items],
            num_classes=rows.num_classes,
            sizes=sizes,
            draws=job.draws,
            rng=numpy_rng(job.seed, "forecast check"),
        )
        for items, sizes in ((kept, job.checked), (drawn, verified))
    )
    return MapOutput(
        num_features=features_NF.shape[1],
        curve=points_of(curve),
        checks=checks,
        verification=verification,
        seconds=time.monotonic() - began,
    )


@torch.no_grad()
def _map_features(
    job: ForecastJob, chosen: MapConfig, rows: LabelledImages, store: ObjectStore
) -> Array:
    """Returns features of every item, (N, F) float64.

    Raises:
        ConfigError: the network is missing, takes other images, or has no such block.
    """
    if isinstance(chosen, PixelMap):
        return rows.tensor().flatten(1).double().numpy()
    if not isinstance(chosen, NetworkMap):
        rng = torch_rng(job.seed, f"forecast map {chosen.name}")
        x_ND = rows.tensor().flatten(1)
        return random_map(x_ND, hidden=chosen.hidden, gain=chosen.gain, rng=rng).double().numpy()
    location = chosen.model
    if location is None:
        assert job.teacher is not None, "the job is only valid if every network map has a model"
        location = teacher_location(job.teacher)
    network = load_classifier(store, location, image_shape=rows.image_shape).eval()
    batches = np.split(np.arange(len(rows)), range(BATCH, len(rows), BATCH))
    try:
        parts = [
            pooled_block(network.blocks(rows.tensor(batch)), chosen.block, chosen.grid)
            for batch in batches
        ]
    except ConfigError as error:
        raise ConfigError(f"map {chosen.name} of {location}: {error}") from None
    return torch.cat(parts).double().numpy()
