"""A small stored hub whose routes depend on the input, and rows to predict."""

import torch

from dist_tl.cluster.inputs import RowsInput
from dist_tl.datasets.digits import DigitsConfig
from dist_tl.methods.hub.pathway import HubPathway
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.networks import build_network
from dist_tl.models.resnet import ResNetConfig
from dist_tl.shards.manifest import StageManifest, open_stage
from dist_tl.shards.order import ShardPlan
from dist_tl.train.hub_model import hub_files
from dist_tl.train.rows import RowsSpec, load_rows

NAMES, CLASSES, ROWS = ("first", "second", "third"), 10, 96
LOCATION = "models/hub"
SOURCE = RowsInput(rows=RowsSpec(data=DigitsConfig(limit=ROWS)), samples_per_shard=16)


def network(classes, seed):
    return build_network(
        ResNetConfig(width=4, blocks=(1, 1), norm="group"),
        num_classes=classes,
        image_shape=(1, 8, 8),
        rng=torch.Generator().manual_seed(seed),
    )


def small_hub(**routes):
    """A hub in eval mode; each digit has its own routes and every expert is used."""
    experts = {name: network(CLASSES, i) for i, name in enumerate(NAMES)}
    router = network(2 * len(NAMES), 9)
    for module in (*experts.values(), router):
        torch.nn.init.normal_(module.head.weight, generator=torch.Generator().manual_seed(3))
    hub = HubPathway(
        experts, router, num_classes=CLASSES, routes=RouteConfig(**{"k": 2, **routes})
    ).eval()
    with torch.no_grad():  # no expert is preferred everywhere
        router.head.bias -= router(load_rows(SOURCE.rows).tensor()).mean(dim=0)
    return hub


def store_hub(store, hub):
    for name, data in hub_files(hub).items():
        store.write(f"{LOCATION}/{name}", data)


def predictions(store):
    """Stores the manifest of the predictions; returns their plan."""
    plan = ShardPlan(
        stage="predictions",
        fingerprint="0",
        purpose="predictions",
        seed=0,
        num_samples=ROWS,
        samples_per_shard=16,
        lanes=1,
        window=1,
        format="npy",
    )
    manifest = StageManifest(
        plan=plan,
        kind="predictions",
        condition="none",
        image_shape=(CLASSES, 1, 1),
        num_classes=CLASSES,
        generator="hub",
    )
    open_stage(store, manifest)
    return plan
