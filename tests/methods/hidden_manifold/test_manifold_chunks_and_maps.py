"""Moment sums shared among workers, and feature maps from block outputs."""

import pytest
import torch

from dist_tl.errors import ConfigError
from dist_tl.methods.hidden_manifold.feature_maps import pooled_block
from dist_tl.methods.hidden_manifold.moment_chunks import (
    sum_chunks,
    sums_from_tensors,
    sums_to_tensors,
)
from dist_tl.methods.hidden_manifold.sampling import ManifoldConfig, draw_tasks

CHUNKS = [(0, 300), (1, 300), (2, 100)]


@pytest.mark.parametrize("binned", [True, False])
def test_sums_of_several_workers_merge_to_those_of_one(binned):
    task = draw_tasks(ManifoldConfig(source_latent=3, target_latent=3, inputs=7), seed=1).target
    weights_KD = torch.ones(2, 7, dtype=torch.float64)
    parts = [
        sums_to_tensors(*sum_chunks(task, weights_KD, "tanh", part, seed=4, binned=binned))
        for part in (CHUNKS[:1], CHUNKS[1:2], CHUNKS[2:], CHUNKS)
    ]
    merged, whole = sums_from_tensors(parts[:3]), sums_from_tensors(parts[3:])
    assert merged[0].count == whole[0].count == 700
    assert torch.equal(merged[0].sum_vv_KK, whole[0].sum_vv_KK)
    assert (merged[1] is None) == (not binned)
    if binned:
        assert torch.equal(merged[1].sum_BKK, whole[1].sum_BKK)


def test_blocks_become_vectors_and_a_missing_one_is_refused():
    outputs = [torch.ones(2, 3, 8, 8), torch.ones(2, 5, 4), torch.ones(2, 6)]
    assert [pooled_block(outputs, i, 2).shape[1] for i in (0, 1, 2, -1)] == [12, 4, 6, 6]
    with pytest.raises(ConfigError, match="block 3 is not one of the 3"):
        pooled_block(outputs, 3, 2)
