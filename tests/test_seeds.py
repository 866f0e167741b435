"""Seeds depend on their arguments only, are distinct, and never change."""

import math

import numpy as np
import pytest
import torch

from dist_tl.seeds import derive_seed, numpy_rng, row_rngs, torch_rng


def test_seeds_never_change_between_versions():
    # Regenerated shards and resumed runs need the draws of earlier versions.
    assert derive_seed(0, "a") == 3410887994953138782
    assert derive_seed(7, "pseudo noise", 3) == 5177465415580700741
    assert derive_seed(7, "pseudo noise", 3, 1) == 836847637415914250
    assert derive_seed(-1, "é", 2**70) == 8068468884173901436


def test_generators_are_independent():
    first = torch.rand(5, generator=torch_rng(1, "x", 2))
    torch.rand(3, generator=torch_rng(1, "x", 3))
    torch.manual_seed(99)
    assert torch.equal(torch.rand(5, generator=torch_rng(1, "x", 2)), first)
    assert numpy_rng(1, "x", 2).random() == numpy_rng(1, "x", 2).random()


def test_no_global_generator_is_used():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state(legacy=False)["state"]["key"].copy()
    torch.rand(4, generator=torch_rng(0, "x"))
    numpy_rng(0, "x").random(4)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state(legacy=False)["state"]["key"] == before[1]).all()


def test_100_000_seeds_are_distinct():
    seeds = {
        derive_seed(run, purpose, *index)
        for run in range(5)
        for purpose in ("", "pp", "pp noise", "p|p", "1")
        for index in [(), *((i,) for i in range(2000)), *((i, i + 1) for i in range(2000))]
    }
    assert len(seeds) == 5 * 5 * 4001


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((0, "ab", 1), (0, "a", 11)),
        ((0, "a", 1, 2), (0, "a", 12)),
        ((0, "a", 1), (0, "a", 1, 0)),
        ((1, "a", 1), (11, "a")),
        ((0, "a|1:b"), (0, "a", 1)),
        ((0, "a", -1), (0, "a", 1)),
    ],
)
def test_arguments_with_similar_text_have_different_seeds(one, other):
    assert derive_seed(*one) != derive_seed(*other)


def test_seeds_are_63_bit_integers():
    seeds = [derive_seed(0, "range", i) for i in range(1000)]
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62, "all 63 bits are used"


def test_neighbouring_indices_are_uncorrelated():
    n = 2000
    draws = torch.stack([torch.randn(2, generator=torch_rng(0, "x", i)) for i in range(n)]).double()
    first, following = draws[:-1, 0], draws[1:, 0]
    bound = 4 / math.sqrt(n)
    assert abs(torch.corrcoef(torch.stack([first, following]))[0, 1]) < bound
    assert abs(torch.corrcoef(draws.T)[0, 1]) < bound
    assert abs(draws.mean()) < bound
    assert abs(draws.std() - 1) < bound


def test_the_draws_of_a_row_do_not_depend_on_the_batch():
    together = [torch.rand(3, generator=rng) for rng in row_rngs(4, "noise", range(10))]
    for start in range(10):
        alone = [torch.rand(3, generator=rng) for rng in row_rngs(4, "noise", [start])]
        assert torch.equal(alone[0], together[start])


def test_numpy_and_torch_integers_are_accepted():
    assert derive_seed(np.int64(3), "x", torch.tensor(4)) == derive_seed(3, "x", 4)


@pytest.mark.parametrize("index", [1.0, 1.5, "1", None])
def test_other_types_than_integers_are_rejected(index):
    with pytest.raises(TypeError):
        derive_seed(0, "x", index)
    with pytest.raises(TypeError):
        derive_seed(index, "x")
