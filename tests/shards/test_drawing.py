"""Pseudo samples: all random draws depend on the sample's number only."""

import io
import tarfile

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn

from dist_tl.datasets.images import LabelledImages
from dist_tl.errors import ConfigError, NumericsError
from dist_tl.methods.pseudo.conditions import ConditionConfig, source_probabilities
from dist_tl.models.generators.config import StoredDiffusionConfig
from dist_tl.models.generators.diffusion import ClassDiffusion, DiffusionConfig
from dist_tl.shards.drawing import (
    ByClass,
    ByTarget,
    GenerateSpec,
    draw_samples,
    generator_fingerprint,
    open_generate_stage,
    open_generator,
    read_conditions,
)
from dist_tl.shards.order import orders
from dist_tl.shards.writer import ShardConfig, pack_shard, write_shard
from dist_tl.storage import layout

K = 4
SOFT = ByTarget(condition=ConditionConfig(kind="soft"))


class Painter:
    """A fake generator: the condition as a grey level, plus noise.

    `rounding` simulates rounding errors of a real generator that depend on the batch size.
    """

    num_classes, image_shape = K, (1, 3, 3)

    def __init__(self, rounding=0.0):
        self.rounding, self.calls = rounding, []

    def sample(self, condition, *, rng):
        self.calls.append(condition.clone())
        noise = torch.stack([torch.randn(self.image_shape, generator=g) for g in rng])
        grey = condition @ torch.linspace(-0.6, 0.6, K)
        return grey[:, None, None, None] + 0.1 * noise + self.rounding * len(condition)


def spec_of(draw=None, *, num_samples=24, samples_per_shard=8, batch_size=8, **fields):
    spec = {
        "name": "pp-shards",
        "seed": 5,
        "generator": StoredDiffusionConfig(path="unused"),
        "generator_fingerprint": "g" * 16,
        "image_shape": (1, 3, 3),
    }
    return GenerateSpec(
        num_classes=K,
        draw=draw or ByClass(),
        num_samples=num_samples,
        batch_size=batch_size,
        shards=ShardConfig(samples_per_shard=samples_per_shard, lanes=1),
        **{**spec, **fields},
    )


def probabilities(num_rows=7, seed=0):
    return torch.randn(num_rows, K, generator=torch.Generator().manual_seed(seed)).softmax(dim=1)


def drawn(spec, q_NK=None, generator=None):
    """Returns all samples of a stage, in order."""
    generator = generator or Painter()
    per_order = [draw_samples(order, spec, generator, q_NK) for order in orders(spec.plan())]
    return [sample for samples in per_order for sample in samples]


def pixels(samples):
    return np.stack([sample.image for sample in samples])


def soft_labels(samples):
    soft = [sample.soft for sample in samples if sample.soft is not None]
    assert len(soft) == len(samples)
    return np.stack(soft)


def labels(samples):
    return np.array([sample.label for sample in samples], dtype=np.int64)


# Dependence on the sample's number only.


@pytest.mark.parametrize("draw", [ByClass(), SOFT])
def test_samples_do_not_depend_on_how_they_are_packed_or_batched(draw):
    """Conditions, labels and noise exactly; pixels too if their rounding is."""
    reference = drawn(spec_of(draw), probabilities())
    for packing in ({"samples_per_shard": 5}, {"batch_size": 3}, {"num_samples": 11}):
        others = drawn(spec_of(draw, **packing), probabilities())
        for one, other in zip(reference, others, strict=False):
            assert (one.number, one.label, one.provenance) == (
                other.number,
                other.label,
                other.provenance,
            )
            np.testing.assert_array_equal(one.soft, other.soft)
            np.testing.assert_array_equal(one.image, other.image)


def test_pixels_are_equal_for_equal_batches_if_rounding_depends_on_the_batch():
    """Real generators guarantee no more, so the batches depend on the order only."""
    spec = spec_of(samples_per_shard=8, batch_size=4)
    rounding = Painter(rounding=0.01)
    np.testing.assert_array_equal(
        pixels(drawn(spec, generator=rounding)), pixels(drawn(spec, generator=rounding))
    )
    same_batches = spec_of(samples_per_shard=4, batch_size=4)
    np.testing.assert_array_equal(
        pixels(drawn(spec, generator=rounding)), pixels(drawn(same_batches, generator=rounding))
    )
    other_batches = spec_of(samples_per_shard=8, batch_size=8)
    assert (
        pixels(drawn(spec, generator=rounding)) != pixels(drawn(other_batches, generator=rounding))
    ).any()
    assert other_batches.plan().fingerprint != spec.plan().fingerprint


@pytest.mark.parametrize("draw", [ByClass(), SOFT])
def test_a_retry_produces_the_same_bytes_regardless_of_earlier_draws(draw):
    spec, q_NK = spec_of(draw), probabilities()
    order = spec.plan().order(1)
    torch.manual_seed(1)
    first = pack_shard(order, draw_samples(order, spec, Painter(), q_NK))
    drawn(spec, q_NK)
    torch.manual_seed(2)
    again = pack_shard(order, draw_samples(order, spec, Painter(), q_NK))
    assert first.data == again.data
    assert first.sha256 != pack_shard(spec.plan().order(2), drawn(spec, q_NK)[16:]).sha256


@pytest.mark.parametrize("change", [{"seed": 6}, {"name": "p_ssl-shards-seed0"}])
def test_another_seed_or_stage_draws_different_noise_and_labels(change):
    one, other = drawn(spec_of(num_samples=64)), drawn(spec_of(num_samples=64, **change))
    assert [sample.label for sample in one] != [sample.label for sample in other]
    assert not any(np.array_equal(a.image, b.image) for a, b in zip(one, other, strict=True))


def test_each_sample_of_one_condition_has_different_noise():
    q_NK = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    samples = drawn(spec_of(SOFT), q_NK)
    assert len({sample.image.tobytes() for sample in samples}) == len(samples)
    assert len({soft.tobytes() for soft in soft_labels(samples)}) == 1


def test_the_generator_processes_one_order_in_fixed_batches():
    generator = Painter()
    drawn(spec_of(num_samples=19, samples_per_shard=8, batch_size=3), generator=generator)
    assert [len(rows) for rows in generator.calls] == [3, 3, 2, 3, 3, 2, 3]


# Pseudo pre-training: labels.


def test_a_label_is_the_class_of_the_generators_condition():
    generator = Painter()
    samples = drawn(spec_of(), generator=generator)
    given = torch.cat(generator.calls)
    assert set(given.unique().tolist()) == {0.0, 1.0}
    assert given.argmax(dim=1).tolist() == [sample.label for sample in samples]
    assert given.sum(dim=1).tolist() == [1.0] * len(samples)
    assert all(sample.soft is None for sample in samples)


def test_labels_are_uniform():
    drawn_labels = labels(drawn(spec_of(num_samples=2000, batch_size=500)))
    counts = np.bincount(drawn_labels, minlength=K)
    assert chisquare(counts).pvalue > 0.001
    assert not np.array_equal(drawn_labels, np.arange(2000) % K)


# P-SSL: conditions.


def test_a_condition_is_the_row_of_the_sample_s_target_image():
    q_NK, generator = probabilities(), Painter()
    samples = drawn(spec_of(SOFT, num_samples=300), q_NK, generator)
    target_rows = [sample.provenance["target_row"] for sample in samples]
    assert torch.equal(torch.cat(generator.calls), q_NK[target_rows])
    np.testing.assert_array_equal(soft_labels(samples), q_NK[target_rows].numpy())
    assert all(sample.label is None for sample in samples)
    assert chisquare(np.bincount(target_rows, minlength=7)).pvalue > 0.001


@pytest.mark.parametrize("kind", ["hard", "marginal", "uniform"])
def test_only_hard_one_class_conditions_have_a_target_image(kind):
    draw = ByTarget(condition=ConditionConfig(kind=kind))
    generator = Painter()
    samples = drawn(spec_of(draw), probabilities(), generator)
    assert set(torch.cat(generator.calls).unique().tolist()) == {0.0, 1.0}
    rows = {sample.provenance["target_row"] for sample in samples}
    assert (rows == {-1}) is (kind != "hard")


def test_permuting_target_labels_changes_no_byte():
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 3, 1)).astype(np.uint8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        classifier = nn.Sequential(nn.Flatten(), nn.Linear(9, K))
    shards = []
    for target_labels in (np.arange(9) % 3, (np.arange(9) + 1) % 3):
        target = LabelledImages(images, target_labels, ("a", "b", "c"))
        q_NK = source_probabilities(classifier, target.tensor())
        order = spec_of(SOFT).plan().order(0)
        shards.append(pack_shard(order, draw_samples(order, spec_of(SOFT), Painter(), q_NK)).data)
    assert shards[0] == shards[1]


@pytest.mark.parametrize("row", [[0.5, 0.5, 0.5, 0.0], [1.5, -0.5, 0.0, 0.0]])
def test_conditions_off_the_simplex_are_rejected(row):
    with pytest.raises(ConfigError, match="condition: row 0"):
        drawn(spec_of(SOFT), torch.tensor([row]))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_pixel_error_names_the_sample(value):
    class Broken(Painter):
        def sample(self, condition, *, rng):
            images = super().sample(condition, rng=rng)
            if len(self.calls) == 3:
                images[1, 0, 2, 2] = value
            return images

    with pytest.raises(NumericsError, match="pseudo sample 17 has pixels that are not finite"):
        drawn(spec_of(), generator=Broken())


def test_pixels_out_of_range_are_clamped_to_black_and_white():
    class Loud(Painter):
        def sample(self, condition, *, rng):
            return 100.0 * super().sample(condition, rng=rng)

    levels = pixels(drawn(spec_of(), generator=Loud()))
    assert (levels.min(), levels.max()) == (0, 255)
    assert ((levels == 0) | (levels == 255)).mean() > 0.9


# Stages.


def test_the_plan_changes_with_every_field_that_changes_samples():
    spec = spec_of(SOFT)
    changes = (
        {"seed": 6},
        {"name": "other"},
        {"generator_fingerprint": "h" * 16},
        {"conditions_fingerprint": "c" * 16},
        {"batch_size": 4},
        {"draw": ByTarget(condition=ConditionConfig(kind="hard"))},
        {"draw": ByClass()},
    )
    prints = [spec.plan().fingerprint]
    prints += [spec.model_copy(update=change).plan().fingerprint for change in changes]
    assert len(set(prints)) == len(prints)
    moved = spec.model_copy(update={"generator": StoredDiffusionConfig(path="elsewhere")})
    assert moved.plan().fingerprint == spec.plan().fingerprint


def test_the_first_samples_of_a_longer_stage_are_those_of_a_shorter_one():
    """Fresh and stored samples are the same; only their number differs."""
    short, long = spec_of(num_samples=16), spec_of(num_samples=40)
    assert short.plan().fingerprint == long.plan().fingerprint
    assert [short.plan().order(i) for i in range(2)] == [long.plan().order(i) for i in range(2)]
    np.testing.assert_array_equal(pixels(drawn(short)), pixels(drawn(long)[:16]))


@pytest.mark.parametrize(("draw", "kind"), [(ByClass(), "pp"), (SOFT, "p_ssl")])
def test_opening_a_stage_stores_its_manifest_and_conditions(store, draw, kind):
    spec, q_NK = spec_of(draw), probabilities()
    manifest = open_generate_stage(store, spec, q_NK, created_by={"dist_tl": "0"})
    assert (manifest.kind, manifest.num_classes, manifest.image_shape) == (kind, K, (1, 3, 3))
    assert manifest.condition == ("uniform" if kind == "pp" else "soft")
    assert manifest.plan == spec.plan()
    if kind == "pp":
        assert read_conditions(store, spec) is None
        assert store.read_or_none(layout.conditions_key(spec.name)) is None
    else:
        stored = read_conditions(store, spec)
        assert stored is not None
        assert torch.equal(stored, q_NK)
    assert open_generate_stage(store, spec, q_NK, created_by={"dist_tl": "1"}) == manifest


def test_a_stage_that_draws_by_target_needs_conditions(store):
    with pytest.raises(ConfigError, match="stage pp-shards draws by target images and needs"):
        open_generate_stage(store, spec_of(SOFT), None, created_by={})


def test_a_stage_with_other_samples_is_rejected(store):
    open_generate_stage(store, spec_of(), None, created_by={})
    with pytest.raises(ConfigError, match=r"already holds other samples: plan\.fingerprint"):
        open_generate_stage(store, spec_of(batch_size=2), None, created_by={})


def test_the_conditions_of_another_job_are_never_overwritten(store):
    spec, q_NK = spec_of(SOFT, conditions_fingerprint="theirs"), probabilities()
    open_generate_stage(store, spec, q_NK, created_by={})
    other = spec_of(SOFT, conditions_fingerprint="ours")
    with pytest.raises(ConfigError, match="already holds other samples"):
        open_generate_stage(store, other, probabilities(seed=1), created_by={})
    assert torch.equal(read_conditions(store, spec), q_NK)


def test_shards_hold_images_labels_and_provenance_and_no_pickle(store):
    spec = spec_of(SOFT, num_samples=8)
    order = spec.plan().order(0)
    write_shard(order, draw_samples(order, spec, Painter(), probabilities()), store)
    with tarfile.open(fileobj=io.BytesIO(store.read(layout.shard_key(spec.name, 0)))) as tar:
        kinds = {name.partition(".")[2] for name in tar.getnames()}
    assert kinds == {"png", "soft.npy", "json"}


# Generators.


@pytest.fixture(scope="module")
def generator_files():
    config = DiffusionConfig(channels=(8,), num_steps=2)
    rng = torch.Generator().manual_seed(0)
    return ClassDiffusion(config, num_classes=K, image_shape=(1, 4, 4), rng=rng).to_files()


def put(store, folder, files):
    for name, data in files.items():
        store.write(f"{folder}/{name}", data)


def test_a_stored_generator_is_loaded_frozen_and_generates_images(store, generator_files):
    put(store, "stages/generator/model", generator_files)
    config = StoredDiffusionConfig(path="stages/generator/model")
    generator = open_generator(store, config)
    assert isinstance(generator, ClassDiffusion)
    before = {name: value.clone() for name, value in generator.state_dict().items()}
    spec = spec_of(num_samples=4, image_shape=(1, 4, 4))
    samples = drawn(spec, generator=generator)
    assert pixels(samples).shape == (4, 4, 4, 1)
    np.testing.assert_array_equal(pixels(samples), pixels(drawn(spec, generator=generator)))
    assert not generator.training
    after = generator.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in generator.parameters())


def test_a_missing_generator_error_names_its_path(store):
    with pytest.raises(ConfigError, match=r"no model at .*nowhere"):
        open_generator(store, StoredDiffusionConfig(path="nowhere"))


def test_the_generator_fingerprint_does_not_depend_on_the_path(store, generator_files):
    put(store, "one", generator_files)
    put(store, "two", generator_files)
    one = generator_fingerprint(store, StoredDiffusionConfig(path="one"))
    assert generator_fingerprint(store, StoredDiffusionConfig(path="two")) == one
    fewer_steps = StoredDiffusionConfig(path="one", num_steps=1)
    assert generator_fingerprint(store, fewer_steps) != one
    put(store, "two", {**generator_files, "config.json": b"{}"})
    assert generator_fingerprint(store, StoredDiffusionConfig(path="two")) != one
