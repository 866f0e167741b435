"""Measures the (source, target) pairs of the divergence forecast."""

from itertools import product

import numpy as np
import torch
from torch import Tensor

from dist_tl.jobs.geometric_labels.labelling import PoolLabels
from dist_tl.jobs.workers import Workers
from dist_tl.methods.geometry.pairs import Pair, measured_pair
from dist_tl.methods.geometry.pool import part_classes
from dist_tl.train.rows import RowsSpec, load_rows


def measure_pairs(labels: PoolLabels, workers: Workers) -> tuple[Pair, ...]:
    """Returns all pairs of the job, with near/max labels; empty if the job has none.

    Raises:
        DistTLError: a named error; finished stages and tasks are kept.
    """
    plan, job, config = labels.plan, labels.plan.job, labels.plan.job.pairs
    if config is None:
        return ()
    labellings, tuples_Nm = {}, labels.tuples("g2l_near_max")
    for source in config.sources:
        name, member_N = f"pair-{''.join(source)}", _members(labels, "pool", source)
        classes_N = part_classes(name, tuples_Nm, member_N, job.rare)
        labellings[source] = labels.store(name, classes_N)
    labels.write_shards("pair shards", labellings.values())
    workers.train([plan.base(labelling) for labelling in labellings.values()])
    rate, keys, specs = job.rates[len(job.rates) // 2], [*product(labellings, config.targets)], []
    for source, target in keys:
        data, base = job.target.data.model_copy(update={"classes": target}), labellings[source].name
        name = f"{base}-to-{''.join(target)}"
        for repeat in range(config.seeds):
            specs.append(plan.fine_tuning(name, rate, repeat, base, data))
    errors = np.array([1 - result.accuracy for result in workers.train(specs)])
    pool_ND, target_KD = labels.features("pool"), labels.features("target")
    return tuple(
        measured_pair(
            "".join(source),
            "".join(target),
            pool_ND[_members(labels, "pool", source)],
            target_KD[_members(labels, "target", target)],
            float(np.mean(values)),
        )
        for (source, target), values in zip(keys, errors.reshape(len(keys), -1), strict=True)
    )


def _members(labels: PoolLabels, name: str, classes: tuple[str, ...]) -> Tensor:
    """Returns a mask of the items of some classes."""
    rows = load_rows(RowsSpec(data=labels.plan.data_sets[name]))
    return torch.from_numpy(np.isin(rows.labels, [*map(rows.class_names.index, classes)]))
