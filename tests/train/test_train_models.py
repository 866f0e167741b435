"""Initial models of a stage: fresh, pretrained, or rejected; and their files."""

import pytest
import torch
from torch import nn

from dist_tl.errors import ConfigError
from dist_tl.models.networks import build_network
from dist_tl.models.resnet import ResNetConfig
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.engine import Engine, EngineConfig, OptimizerConfig
from dist_tl.train.models import (
    NewNetwork,
    PretrainedTrunk,
    Readout,
    build_model,
    load_classifier,
    load_weights,
    model_files,
)

SHAPE = (1, 8, 8)
CONFIG = ResNetConfig(width=4, blocks=(1, 1))


def trained_network(num_classes=5, seed=3):
    network = build_network(
        CONFIG,
        num_classes=num_classes,
        image_shape=SHAPE,
        rng=torch.Generator().manual_seed(seed),
    )
    network(
        torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    )  # updates running statistics
    return network


def store_network(store, location, network):
    for name, data in model_files(network).items():
        store.write(f"{location}/{name}", data)


@pytest.fixture
def store(tmp_path):
    return ObjectStore(tmp_path / "run")


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_the_seed_alone_determines_fresh_weights(store):
    spec = NewNetwork(network=CONFIG, num_classes=5)
    one, again, other = (
        state_of(build_model(spec, store, image_shape=SHAPE, seed=seed)) for seed in (1, 1, 2)
    )
    assert equal(one, again)
    assert not equal(one, other)


@pytest.mark.parametrize("location", ["stages/pp-trunk/model", "elsewhere"])
def test_a_pretrained_trunk_is_unchanged_under_a_fresh_head(store, tmp_path, location):
    source = trained_network()
    is_key = location.startswith("stages")
    store_network(store if is_key else ObjectStore(tmp_path), location, source)
    model = location if is_key else f"{tmp_path}/{location}"
    spec = PretrainedTrunk(model=model, num_classes=40)
    network = build_model(spec, store, image_shape=SHAPE, seed=0)
    assert equal(state_of(network.trunk), state_of(source.trunk))
    assert network.head.weight.shape == (40, source.num_features)
    assert network.head.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not network.head.bias.any()
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_a_pretrained_model_starts_with_an_empty_optimizer(store, alone):
    store_network(store, "m", trained_network())
    network = build_model(
        PretrainedTrunk(model="m", num_classes=3), store, image_shape=SHAPE, seed=0
    )
    engine = Engine(network, EngineConfig(), OptimizerConfig(), batch_per_rank=2, num_steps=3)
    assert engine.num_updates == 0
    assert all(fragment.moments() == {} for fragment in engine.fragments)
    engine.close()


def test_a_missing_model_is_named_with_its_missing_files(store):
    with pytest.raises(ConfigError, match=r"no model at .*/m: model\.safetensors and config\.json"):
        load_classifier(store, "m")
    store_network(store, "m", trained_network())
    store.delete("m/config.json")
    with pytest.raises(ConfigError, match=r"/m: config\.json not found"):
        load_classifier(store, "m")


def test_a_model_for_another_image_shape_is_rejected_with_both_shapes(store):
    store_network(store, "m", trained_network())
    with pytest.raises(ConfigError, match=r"\(1, 8, 8\), the data has \(3, 8, 8\)"):
        load_classifier(store, "m", image_shape=(3, 8, 8))
    assert load_classifier(store, "m", image_shape=SHAPE).num_classes == 5


class Tied(nn.Module):
    """A shared weight and a non-persistent buffer."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("passing", torch.zeros(2), persistent=False)


def test_weights_are_loaded_by_name_with_shared_weights_and_all_buffers():
    module = Tied()
    names = ["one.weight", "one.bias", "two.bias", "passing"]
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    weights = {name: torch.full_like(own[name], i) for i, name in enumerate(names, start=1)}
    assert load_weights(module, weights) is module
    assert [own[name].unique().tolist() for name in names] == [[1.0], [2.0], [3.0], [4.0]]
    assert module.two.weight is module.one.weight
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_weights_of_another_module_are_rejected(change):
    module = Tied()
    weights = {n: p.detach() for n, p in [*module.named_parameters(), *module.named_buffers()]}
    if change == "missing":
        del weights["two.bias"]
    else:
        weights["three.bias"] = torch.zeros(3)
    name = "two.bias" if change == "missing" else "three.bias"
    with pytest.raises(ValueError, match=f"only one side has {name}"):
        load_weights(module, weights)


def test_a_readout_trains_only_its_head_without_bias_from_zero():
    store = ObjectStore("memory://readout")
    source = trained_network()
    store_network(store, "source", source)
    spec = Readout(trunk=PretrainedTrunk(model="source", num_classes=2))
    network = build_model(spec, store, image_shape=SHAPE, seed=0)
    learnable = [name for name, p in network.named_parameters() if p.requires_grad]
    assert learnable == ["head.weight"]
    assert network.head.bias is None
    assert not network.head.weight.any()
    for name, parameter in network.trunk.named_parameters():
        assert torch.equal(parameter, dict(source.trunk.named_parameters())[name])
