"""Small stored experts and hubs for the hub tests.

Not in conftest.py, since several modules have that name, and rank processes import by module.
"""

import safetensors.torch
import torch

from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.networks import build_network
from dist_tl.models.resnet import ResNetConfig
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import HUB_TENSORS, ExpertSource, NewHub
from dist_tl.train.models import build_model, model_files

SHAPE, CLASSES, EXPERTS = (1, 8, 8), 3, ("plain", "wide", "deep")
MAKES = {
    "plain": {"width": 4, "blocks": (1, 1)},
    "wide": {"width": 6, "blocks": (1,)},
    "deep": {"width": 2, "blocks": (1, 1)},
}


def put(store, location, files):
    for name, data in files.items():
        store.write(f"{location}/{name}", data)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def images(rows=20, seed=1):
    return torch.rand(rows, *SHAPE, generator=rng(seed)) * 2 - 1


def pretrained(name, *, norm="group", shape=SHAPE):
    """An expert for five other classes, with updated running statistics."""
    config = ResNetConfig(norm=norm, **MAKES[name])
    seed = EXPERTS.index(name)
    network = build_network(config, num_classes=5, image_shape=shape, rng=rng(seed))
    network(torch.randn(16, *shape, generator=rng(seed)))
    return network


def store_experts(url, *, norm="group"):
    for name in EXPERTS:
        put(ObjectStore(url), f"experts/{name}", model_files(pretrained(name, norm=norm)))


def source(name, **fields):
    return ExpertSource(name=name, **{"model": f"experts/{name}", **fields})


def new_hub(experts=EXPERTS, *, warm=None, batchnorm="frozen", sources=None, **routes):
    return NewHub(
        experts=sources or tuple(map(source, experts)),
        router=ResNetConfig(width=2, blocks=(1,), norm="group"),
        routes=RouteConfig(**routes),
        batchnorm=batchnorm,
        warm=warm,
        num_classes=CLASSES,
    )


def build(spec, url, seed=11):
    return build_model(spec, ObjectStore(url), image_shape=SHAPE, seed=seed)


def perturbed(module, seed=3):
    """Adds noise to the initial weights, whose routes are uniform."""
    generator = rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_equal_states(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def warm_start_files(hub):
    """Returns warm-start files with the heads, router and aggregator of `hub`."""
    parts = ("router.", "aggregator.")
    own = {n: t for n, t in hub.state_dict().items() if n.startswith(parts) or ".head." in n}
    return {HUB_TENSORS: safetensors.torch.save({n: t.clone() for n, t in own.items()})}
