"""What the oracle asks of a readout that the trainers fitted, and the tasks it asks it on.

The hidden manifold's answer is known before anything is trained: for a given feature map, the
error that an optimal readout has, and for given samples, the optimal readout itself.
"""

import numpy as np
import torch

from dist_tl.methods.hidden_manifold.gaussian_model import hidden_features
from dist_tl.methods.hidden_manifold.readout import fit_logistic
from dist_tl.methods.hidden_manifold.sampling import ManifoldConfig, draw_tasks, sample_chunk
from dist_tl.models.perceptron import PerceptronConfig
from dist_tl.seeds import torch_rng
from dist_tl.shards.drawing import ByClass, GenerateSpec, ManifoldTaskConfig
from dist_tl.shards.reader import read_shard
from dist_tl.shards.writer import ShardConfig

HIDDEN, INPUTS, PENALTY = 200, 500, 1.0
MODEL = ManifoldConfig()
TASK_SEED = 5
NETWORK = PerceptronConfig(hidden=HIDDEN)
SHAPE = (1, 1, INPUTS)


def target_task():
    return draw_tasks(MODEL, seed=TASK_SEED).target


def shards_of(name, role, num, *, seed, per_shard, lanes=2):
    """The order of a stage of samples of one task."""
    generator = ManifoldTaskConfig(model=MODEL, role=role, seed=TASK_SEED)
    return GenerateSpec(
        name=name,
        seed=seed,
        generator=generator,
        generator_fingerprint="manifold",
        num_classes=2,
        image_shape=SHAPE,
        draw=ByClass(),
        num_samples=num,
        batch_size=64,
        shards=ShardConfig(samples_per_shard=per_shard, lanes=lanes),
    )


def stored_samples(store, spec):
    """All samples of a stage as (x, y), read straight from its tars."""
    samples = [s for i in range(spec.plan().num_shards) for s in read_shard(store, spec.name, i)]
    x = np.stack([sample.image.reshape(-1) for sample in samples])
    y = np.array([2.0 * sample.label - 1.0 for sample in samples])
    return torch.from_numpy(x), torch.from_numpy(y)


def fresh_features(weights, num=60_000, chunk=8192):
    for index, first in enumerate(range(0, num, chunk)):
        rng = torch_rng(TASK_SEED, "oracle test", index)
        x, y, _ = sample_chunk(target_task(), min(chunk, num - first), rng=rng)
        yield hidden_features(weights, x, "tanh"), y


def error_of(readouts, weights):
    """Test errors of many readouts (R, K) on one feature map."""
    wrong, total = torch.zeros(len(readouts), dtype=torch.float64), 0
    for v, y in fresh_features(weights):
        wrong += ((v @ readouts.T) * y[:, None] <= 0).sum(dim=0)
        total += len(y)
    return (wrong / total).tolist()


def optimum(store, spec, weights):
    """The exact readout of the stored samples."""
    x, y = stored_samples(store, spec)
    return fit_logistic(hidden_features(weights, x, "tanh"), y, PENALTY)


def readout_of(network):
    """w of a trained network with two logits, and its first layer."""
    head = network.head.weight.detach().double()
    return (head[1] - head[0]) * HIDDEN**0.5, network.trunk.weight.detach().double()


def gradient_norm(readout, weights, store, spec):
    """Of the summed loss, at a readout."""
    x, y = stored_samples(store, spec)
    v = hidden_features(weights, x, "tanh") / HIDDEN**0.5
    margin = y * (v @ readout)
    slope = -(y * torch.sigmoid(-margin)) @ v + PENALTY * readout
    return float(slope.norm())


def relative_gap(one, other):
    return float((one - other).norm() / other.norm())
