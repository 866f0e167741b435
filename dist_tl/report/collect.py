"""Builds the report of a run from the files in its store; the job file is not needed."""

import json

import numpy as np
from safetensors.numpy import load as load_arrays

from dist_tl.errors import ConfigError
from dist_tl.report.gallery import Gallery
from dist_tl.report.page import build_page
from dist_tl.report.results import AnyResults, StudyResults, stored_results
from dist_tl.report.study import build_study_page
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import read_sealed
from dist_tl.train.spec import read_metrics
from dist_tl.train.spec import stored_results as stored_stages


def read_results(store: ObjectStore) -> AnyResults:
    """Returns the results of a finished run.

    Raises:
        ConfigError: the store has no results: the run is not finished, or there is no run.
        DamagedError: the results are not the ones that were written.
    """
    results = stored_results(store)
    if results is None:
        raise ConfigError(
            f"{store.url} contains no {layout.RESULTS}; start the job with `dist-tl run`, or wait "
            "until it has finished"
        )
    return results


def write_report(store: ObjectStore) -> str:
    """Writes the HTML report of a finished run to its store; returns the key of the report.

    Raises:
        ConfigError: the run has no results yet.
        DamagedError: a file that the report shows is not the one that was written.
    """
    results = read_results(store)
    if isinstance(results, StudyResults):
        store.write(layout.REPORT, build_study_page(results).encode())
        return layout.REPORT
    trained = [stage.name for stage in results.stages if "steps" in stage.figures]
    metrics = {
        name: read_metrics(store, result) for name, result in stored_stages(store, trained).items()
    }
    page = build_page(
        results,
        metrics={name: rows for name, rows in metrics.items() if rows},
        gallery=_gallery(store) if results.gallery else None,
    )
    store.write(layout.REPORT, page.encode())
    return layout.REPORT


def _gallery(store: ObjectStore) -> Gallery:
    data = read_sealed(store, layout.GALLERY)
    arrays, names = load_arrays(data), _metadata(data)
    return Gallery(
        pseudo_images=arrays["pseudo_images"],
        conditions=arrays["conditions"],
        source_classes=tuple(json.loads(names["source_classes"])),
        target_images=arrays["target_images"],
        target_labels=arrays["target_labels"].astype(np.int64),
        target_classes=tuple(json.loads(names["target_classes"])),
        captions=tuple(json.loads(names.get("captions", "[]"))),
        title=names.get("title", Gallery.title),
        subject=names.get("subject", Gallery.subject),
    )


def _metadata(data: bytes) -> dict[str, str]:
    # A safetensors file starts with the length of its JSON header, which has the metadata.
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]).get("__metadata__", {})
