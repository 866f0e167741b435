"""Training on cached features equals training on frozen trunks, and initialises the hub."""

import pytest
import torch
from small_hubs import (
    CLASSES,
    EXPERTS,
    SHAPE,
    assert_equal_states,
    build,
    images,
    new_hub,
    perturbed,
    put,
    rng,
    source,
    state_of,
)

from dist_tl.errors import ConfigError
from dist_tl.methods.hub.losses import HubLossConfig
from dist_tl.methods.hub.pathway import HubPathway, Paths
from dist_tl.models.files import load_network
from dist_tl.models.networks import Network
from dist_tl.models.resnet import ResNetConfig
from dist_tl.storage.objects import ObjectStore
from dist_tl.train import hub_model, objectives
from dist_tl.train.cached import CachedExpert, CachedFeatures, CachedHub
from dist_tl.train.hub_model import NewExpert, build_expert
from dist_tl.train.models import model_files


def cached_features(networks):
    offset, columns = SHAPE[1] * SHAPE[2], []
    for name, network in networks.items():
        columns.append(CachedFeatures(name=name, offset=offset, width=network.num_features))
        offset += network.num_features
    return tuple(columns)


def rows_of(networks, x):
    """Returns rows: images and the features of every frozen trunk, as in the cache."""
    with torch.no_grad():
        parts = [network.eval().features(x) for network in networks.values()]
    return torch.cat([x.flatten(1), *parts], dim=1)[:, :, None, None]


def cached(url, seed=11, **routes):
    """Returns a hub on cached features, and the experts that computed them."""
    store = ObjectStore(url)
    networks = {
        name: build_expert(source(name), store, num_classes=CLASSES, image_shape=SHAPE, seed=seed)
        for name in EXPERTS
    }
    spec = CachedHub(hub=new_hub(**routes), features=cached_features(networks), image_shape=SHAPE)
    return build(spec, url, seed), networks


def learn(module, x, y, draws, steps=4):
    """Plain gradient descent on the trainable parameters, with the full hub loss."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        paths = Paths(*module(x, draws, detailed=True))
        loss, _ = objectives.hub_loss(*paths[:3], paths.p_BM, y, HubLossConfig())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("by", ["input", "static", "random"])
def test_training_on_cached_features_equals_training_with_frozen_trunks(run_url, by):
    url, x = run_url("run"), images(24)
    y, draws = torch.arange(24) % CLASSES, torch.randn(24, 3, generator=rng(4))
    light, networks = cached(url, k=2, by=by)
    rows = rows_of(networks, x)
    hub = build(new_hub(k=2, by=by), url)
    for expert in hub.experts.values():
        expert.trunk.requires_grad_(False)
    torch.testing.assert_close(light(rows, draws), hub(x, draws), atol=1e-5, rtol=0)
    losses = learn(hub, x, y, draws)
    assert learn(light, rows, y, draws) == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0]
    torch.testing.assert_close(light(rows, draws), hub(x, draws), atol=1e-4, rtol=0)
    if by != "random":
        torch.testing.assert_close(light.eval()(rows), hub.eval()(x), atol=1e-4, rtol=0)


@pytest.mark.parametrize("by", ["input", "static", "random"])
def test_a_hub_loads_its_warm_start_bit_for_bit_and_keeps_the_trunks(run_url, by):
    url = run_url("run")
    light, _ = cached(url, k=2, by=by)
    put(ObjectStore(url), "warm", model_files(perturbed(light)))
    hub, cold = (build(new_hub(k=2, by=by, warm=warm), url) for warm in ("warm", None))
    trained = {n.replace("router.router", "router"): t for n, t in light.state_dict().items()}
    for name, value in hub.state_dict().items():
        fixed = ".trunk." in name and name.startswith("experts.")
        assert (name not in trained) == fixed, name
        assert torch.equal(value, cold.state_dict()[name] if fixed else trained[name]), name
        assert fixed or not torch.equal(value, cold.state_dict()[name]), name


def test_an_expert_loads_its_warm_head_bit_for_bit(run_url):
    url, x = run_url("run"), images()
    spec = NewExpert(expert=source("wide"), num_classes=CLASSES)
    alone = build(spec, url)
    features = cached_features({"wide": alone})[0]
    head = build(CachedExpert(features=features, num_classes=CLASSES), url)
    rows = rows_of({"wide": alone}, x)
    torch.testing.assert_close(head(rows), alone.eval()(x), atol=1e-5, rtol=0)
    put(ObjectStore(url), "warm", model_files(perturbed(head)))
    warm = build(spec.model_copy(update={"warm": "warm"}), url)
    assert_equal_states(state_of(warm.head), state_of(head.head))
    assert_equal_states(state_of(warm.trunk), state_of(alone.trunk))


def test_a_warm_start_of_another_hub_is_rejected(run_url):
    url = run_url("run")
    store = ObjectStore(url)
    light, _ = cached(url, k=2)
    put(store, "warm", model_files(light))
    for other in (
        new_hub(("plain", "wide"), k=2, warm="warm"),
        new_hub(k=2, by="static", warm="warm"),
        new_hub(k=2, warm="warm").model_copy(
            update={"router": ResNetConfig(width=4, blocks=(1,), norm="group")}
        ),
        NewExpert(expert=source("plain"), warm="warm", num_classes=CLASSES),
    ):
        with pytest.raises(ConfigError, match="belongs to another hub"):
            build(other, url)
    with pytest.raises(ConfigError, match="no model at"):
        build(new_hub(k=2, warm="nowhere"), url)


class Unusual(torch.nn.Module):
    """A trunk with a part named head, a non-persistent buffer and a shared weight."""

    def __init__(self, trunk):
        super().__init__()
        self.head = trunk
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.one = torch.nn.Linear(2, 2)
        self.two = torch.nn.Linear(2, 2)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(x)


def test_a_warm_start_ignores_parts_of_trunks_that_are_named_head(run_url, monkeypatch):
    url = run_url("run")
    make = hub_model.build_network

    def unusual(*arguments, **fields) -> Network:
        network = make(*arguments, **fields)
        network.trunk = Unusual(network.trunk)
        return network

    def unusual_load(files, **options):
        network = load_network(files, **options)
        network.trunk = Unusual(network.trunk)
        return network

    monkeypatch.setattr(hub_model, "build_network", unusual)
    monkeypatch.setattr(hub_model, "load_network", unusual_load)
    light, _ = cached(url, k=2)
    put(ObjectStore(url), "warm", model_files(perturbed(light)))
    hub = build(new_hub(k=2, warm="warm"), url)
    assert isinstance(hub, HubPathway)
    for name in EXPERTS:
        assert torch.equal(hub.experts[name].head.weight, light.experts[name].head.weight)
    assert torch.equal(hub.router.head.weight, light.router.router.head.weight)
