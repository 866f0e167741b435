"""What one Ray task of a forecast computes: one feature map's curve, and how well it is checked."""

import math
import time
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from dist_tl.config import StrictModel
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.spec import DataConfig
from dist_tl.errors import ConfigError
from dist_tl.jobs.forecast.spec import MapConfig, NetworkMap, PixelMap
from dist_tl.methods.hidden_manifold.forecast import (
    Forecast,
    Measured,
    forecast_curve,
    held_out_curve,
    is_reliable,
    principal_components,
)
from dist_tl.seeds import numpy_rng, torch_rng
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import load_classifier
from dist_tl.train.rows import RowsSpec, load_rows

BATCH = 512
Array = NDArray[np.float64]


class MapInputs(StrictModel):
    """Forecast one feature map."""

    seed: int
    data: DataConfig
    map: Annotated[MapConfig, Field(discriminator="kind")]
    model: str | None = Field(description="Where the network is, for maps that have one.")
    components: int
    labelled: int
    sizes: tuple[int, ...]
    lambdas: tuple[float, ...]
    checked: tuple[int, ...]
    draws: int
    bootstrap: int
    verify: bool


class CurvePoint(StrictModel):
    """One size."""

    samples: int
    mse: float
    lam: float
    low: float
    high: float


class CheckPoint(StrictModel):
    """One size, measured."""

    samples: int
    mse: float
    error: float = Field(description="Standard error of `mse`.")
    accuracy: float
    agrees: bool = Field(description="Whether the forecast is within 10 % or 3 standard errors.")


class MapOutput(StrictModel):
    """One feature map's forecast."""

    num_features: int
    classes: int
    curve: tuple[CurvePoint, ...]
    checks: tuple[CheckPoint, ...] = Field(description="With the labels that the forecast sees.")
    verification: tuple[CheckPoint, ...] = Field(description="With all labels of the data.")
    seconds: float


def forecast_map(inputs: MapInputs, store: ObjectStore) -> MapOutput:
    """One map's forecast, checked on held-out labels."""
    began = time.monotonic()
    rows = load_rows(RowsSpec(data=inputs.data))
    features_NF = map_features(inputs, rows, store)
    features_NK = principal_components(features_NF, inputs.components).apply(features_NF)
    order_N = numpy_rng(inputs.seed, "forecast labels").permutation(len(rows))
    kept = order_N[: inputs.labelled]
    curve = forecast_curve(
        features_NK,
        features_NK[kept],
        rows.labels[kept],
        num_classes=rows.num_classes,
        sizes=inputs.sizes,
        lams=inputs.lambdas,
        num_bootstrap=inputs.bootstrap,
        rng=numpy_rng(inputs.seed, "forecast bootstrap"),
    )
    checks = _checks(inputs, curve, features_NK[kept], rows.labels[kept], inputs.checked, rows)
    verification: tuple[CheckPoint, ...] = ()
    if inputs.verify:
        fitting = tuple(size for size in inputs.sizes if size <= len(rows) // 2)
        verification = _checks(inputs, curve, features_NK, rows.labels, fitting, rows)
    return MapOutput(
        num_features=features_NF.shape[1],
        classes=rows.num_classes,
        curve=tuple(
            CurvePoint(samples=int(n), mse=float(mse), lam=float(lam), low=float(a), high=float(b))
            for n, mse, lam, a, b in zip(
                curve.sizes_S, curve.mse_S, curve.lam_S, curve.low_S, curve.high_S, strict=True
            )
        ),
        checks=checks,
        verification=verification,
        seconds=time.monotonic() - began,
    )


def _checks(
    inputs: MapInputs,
    curve: Forecast,
    features_NK: Array,
    labels_N: NDArray[np.int64],
    sizes: tuple[int, ...],
    rows: LabelledImages,
) -> tuple[CheckPoint, ...]:
    lam_of = dict(zip(curve.sizes_S.tolist(), curve.lam_S.tolist(), strict=True))
    measured = held_out_curve(
        features_NK,
        labels_N,
        num_classes=rows.num_classes,
        sizes=sizes,
        lams=[lam_of[size] for size in sizes],
        draws=inputs.draws,
        rng=numpy_rng(inputs.seed, "forecast check"),
    )
    return _check_points(measured, is_reliable(curve, measured))


def _check_points(measured: Measured, agreeing: list[bool]) -> tuple[CheckPoint, ...]:
    columns = measured.sizes_S, measured.mse_S, measured.error_S, measured.accuracy_S, agreeing
    return tuple(
        CheckPoint(
            samples=int(n), mse=float(mse), error=float(error), accuracy=float(acc), agrees=agrees
        )
        for n, mse, error, acc, agrees in zip(*columns, strict=True)
    )


def map_features(inputs: MapInputs, rows: LabelledImages, store: ObjectStore) -> Array:
    """Features of every item, (N, F) float64.

    Raises:
        ConfigError: the network is missing, takes other images, or has no such block.
    """
    if isinstance(inputs.map, PixelMap):
        return rows.tensor().flatten(1).double().numpy()
    if isinstance(inputs.map, NetworkMap):
        return _network_features(inputs, inputs.map, rows, store)
    num_pixels = math.prod(rows.image_shape)
    rng = torch_rng(inputs.seed, f"forecast map {inputs.map.name}")
    weights_FD = torch.randn(inputs.map.hidden, num_pixels, generator=rng)
    scale = inputs.map.gain / math.sqrt(num_pixels)
    return torch.tanh(rows.tensor().flatten(1) @ weights_FD.T * scale).double().numpy()


@torch.no_grad()
def _network_features(
    inputs: MapInputs, chosen: NetworkMap, rows: LabelledImages, store: ObjectStore
) -> Array:
    assert inputs.model is not None, "the plan names a model for every network map"
    network = load_classifier(store, inputs.model, image_shape=rows.image_shape).eval()
    parts = []
    for start in range(0, len(rows), BATCH):
        blocks = network.blocks(rows.tensor(np.arange(start, min(start + BATCH, len(rows)))))
        if not -len(blocks) <= chosen.block < len(blocks):
            raise ConfigError(
                f"map {chosen.name}: block {chosen.block} is not one of the {len(blocks)} of "
                f"{inputs.model}; use 0 to {len(blocks) - 1}, or -1 for the head's input"
            )
        parts.append(pooled(blocks[chosen.block], chosen.grid))
    return torch.cat(parts).double().numpy()


def pooled(output: Tensor, grid: int) -> Tensor:
    """A block's output as vectors (N, F): maps averaged to grid x grid cells, tokens to one."""
    if output.ndim == 4:
        cells = [min(grid, size) for size in output.shape[2:]]
        return functional.adaptive_avg_pool2d(output, cells).flatten(1)
    return output.mean(dim=1) if output.ndim == 3 else output
