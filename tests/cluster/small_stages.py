"""Small stages, and helpers to observe Ray's processes."""

import time
from concurrent.futures import ThreadPoolExecutor, wait
from types import SimpleNamespace

import psutil

from dist_tl.datasets.digits import DigitsConfig
from dist_tl.models.generators.config import StoredDiffusionConfig
from dist_tl.models.generators.diffusion import ClassDiffusion, DiffusionConfig
from dist_tl.models.resnet import ResNetConfig
from dist_tl.seeds import torch_rng
from dist_tl.shards.drawing import (
    ByClass,
    GenerateSpec,
    draw_samples,
    generator_fingerprint,
    open_generate_stage,
    open_generator,
)
from dist_tl.shards.writer import ShardConfig, write_shard
from dist_tl.train.checkpoints import CheckpointConfig
from dist_tl.train.engine import EngineConfig, OptimizerConfig
from dist_tl.train.models import NewNetwork
from dist_tl.train.objectives import SupervisedSpec
from dist_tl.train.rows import RowsSpec
from dist_tl.train.spec import StageSpec

DIGITS = DigitsConfig(limit=200)


def training_stage(name, **fields):
    """Specification of a stage that trains a network of a few hundred weights on digits."""
    fields = {
        "seed": 3,
        "model": NewNetwork(
            network=ResNetConfig(width=4, blocks=(1,), norm="group"), num_classes=10
        ),
        "objective": SupervisedSpec(),
        "image_shape": (1, 8, 8),
        "labelled": RowsSpec(data=DIGITS),
        "views": DIGITS.views,
        "steps": 8,
        "batch_size": 8,
        "lanes": 2,
        "optimizer": OptimizerConfig(),
        "engine": EngineConfig(),
        "evaluate": RowsSpec(data=DIGITS),
        "checkpoints": CheckpointConfig(every_steps=0),
        **fields,
    }
    return StageSpec(name=name, **fields)


def generating_stage(store, name="pp", *, num_shards=6, num_steps=2, **fields):
    """Opens a generate stage with 4 samples per shard; a large `num_steps` makes it slow."""
    generator = ClassDiffusion(
        DiffusionConfig(channels=(8,)),
        num_classes=3,
        image_shape=(1, 8, 8),
        rng=torch_rng(0, "initial weights"),
    )
    for file, data in generator.to_files().items():
        store.write(f"generator/{file}", data)
    config = StoredDiffusionConfig(path="generator", num_steps=num_steps)
    spec = GenerateSpec(
        name=name,
        seed=5,
        generator=config,
        generator_fingerprint=generator_fingerprint(store, config),
        num_classes=3,
        image_shape=(1, 8, 8),
        draw=ByClass(),
        num_samples=4 * num_shards,
        shards=ShardConfig(samples_per_shard=4, lanes=1),
        **fields,
    )
    open_generate_stage(store, spec, None, created_by={})
    return spec


def make_shards(store, spec, indices):
    """Generates shards in a plain loop."""
    generator = open_generator(store, spec.generator)
    for index in indices:
        order = spec.plan().order(index)
        write_shard(order, draw_samples(order, spec, generator, None), store)


def contents(store, prefix):
    """Returns key -> bytes of all objects below `prefix`."""
    return {key: store.read(f"{prefix}/{key}") for key in store.child(prefix).list()}


def wait_until(condition, *, timeout_s=90.0, pause_s=0.05):
    """Polls `condition` until it returns a true value; returns that value."""
    deadline = time.monotonic() + timeout_s
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(pause_s)
    return value


def workers_named(prefix):
    """Returns child processes in which Ray runs the named actor or task."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[0].startswith(f"ray::{prefix}"):
                processes.append(process)
        except (psutil.Error, IndexError):
            continue
    return processes


class RayOfThreads:
    """A stand-in for the `ray` module in which each actor is a thread of this process.

    For tests of a pool's decisions; other tests use real processes.
    """

    def __init__(self):
        self.alive = self.most = 0

    def remote(self, cls):
        return SimpleNamespace(
            options=lambda **_: SimpleNamespace(remote=lambda *args: self._start(cls(*args)))
        )

    def _start(self, instance):
        self.alive += 1
        self.most = max(self.most, self.alive)
        thread = ThreadPoolExecutor(1)
        fulfil = SimpleNamespace(remote=lambda *args: thread.submit(instance.fulfil, *args))
        opening = SimpleNamespace(remote=lambda: thread.submit(instance.open))
        return SimpleNamespace(fulfil=fulfil, open=opening)

    def wait(self, refs, timeout, num_returns=1):
        return_when = "FIRST_COMPLETED" if num_returns == 1 else "ALL_COMPLETED"
        return [list(futures) for futures in wait(refs, timeout, return_when)]

    def get(self, ref):
        return ref.result()

    def kill(self, actor):
        self.alive -= 1
