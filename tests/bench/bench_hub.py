"""Routed inference against running all experts: k of m, at several batch sizes, in one process.

Run by `launch/bench hub`. The experts are five small residual networks on 32x32 colour images, with
balanced routing; running all of them is the cost of an ensemble. The target for every batch size
and k: time <= (k / m) * 1.25 * (time of all experts) + (time of the router).
"""

import time

import torch

from dist_tl.methods.hub.cost import multiply_adds, routed_multiply_adds
from dist_tl.methods.hub.pathway import HubPathway
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.networks import build_network
from dist_tl.models.resnet import ResNetConfig

M, CLASSES, SHAPE = 5, 10, (3, 32, 32)
BATCHES, ROUNDS = (1, 8, 32, 128, 512), 7


def network(classes, seed, width):
    return build_network(
        ResNetConfig(width=width, blocks=(1, 1, 1), norm="batch"),
        num_classes=classes,
        image_shape=SHAPE,
        rng=torch.Generator().manual_seed(seed),
    ).eval()


def spread(router, images):
    """Sets the head of the router so that its choices are balanced over the experts."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        router.head.weight.normal_(generator=rng)
        logits = router(images)
        router.head.bias -= logits.mean(dim=0)
        router.head.weight /= logits.std(dim=0)[:, None]
        router.head.bias /= logits.std(dim=0)


@torch.no_grad()
def seconds(models, images):
    """Returns seconds of one forward pass of each model: the minimum over interleaved rounds."""
    best = [float("inf")] * len(models)
    repeats = max(1, 128 // len(images))
    for _ in range(ROUNDS):
        for i, model in enumerate(models):
            began = time.perf_counter()
            for _ in range(repeats):
                model(images)
            best[i] = min(best[i], (time.perf_counter() - began) / repeats)
    return best


def main():
    torch.set_num_threads(1)
    images = torch.randn(512, *SHAPE, generator=torch.Generator().manual_seed(1))
    experts = {f"expert{i}": network(CLASSES, i, 24) for i in range(M)}
    router = network(2 * M, 9, 8)
    spread(router, images)
    hubs = {
        k: HubPathway(experts, router, num_classes=CLASSES, routes=RouteConfig(k=k)).eval()
        for k in (1, 2, 3, M)
    }

    def all_experts(batch):
        return torch.stack([expert(batch) for expert in experts.values()]).mean(dim=0)

    costs = [multiply_adds(expert, SHAPE) for expert in experts.values()]
    router_cost = multiply_adds(router, SHAPE)
    print(
        f"{M} experts of {costs[0] / 1e6:.1f} million multiply-adds, router {router_cost / 1e6:.1f}"
    )
    for k in hubs:
        counted = routed_multiply_adds(router_cost, costs, [k / M] * M, CLASSES)
        share = counted / sum(costs)
        print(f"  k = {k}: {counted / 1e6:.1f} million multiply-adds, {share:.2f} of all")
    print("milliseconds per batch; in brackets the ratio to the target, which should be below 1")
    print(
        "batch" + "all".rjust(9) + "router".rjust(9) + "".join(f"k = {k}".rjust(18) for k in hubs)
    )
    worst = 0.0
    for size in BATCHES:
        batch = images[:size]
        all_s, router_s, *routed = seconds([all_experts, router, *hubs.values()], batch)
        cells = []
        for k, took in zip(hubs, routed, strict=True):
            ratio = took / (k / M * 1.25 * all_s + router_s)
            worst = max(worst, ratio)
            cells.append(f"{1e3 * took:.2f} ({ratio:.2f})".rjust(18))
        print(f"{size:5d}{1e3 * all_s:9.2f}{1e3 * router_s:9.2f}" + "".join(cells))
    print(f"worst ratio to the target {worst:.2f}")


if __name__ == "__main__":
    main()
