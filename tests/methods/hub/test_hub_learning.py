"""Learning on a toy problem with known routes: five domains with one expert each."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from dist_tl.methods.hub.losses import HubLossConfig, hub_loss
from dist_tl.methods.hub.pathway import HubPathway, Paths, Preference
from dist_tl.methods.hub.routes import RouteConfig

DOMAINS, CLASSES, WIDTH, HIDDEN = 5, 4, 16, 32
STEPS = 300


@functools.lru_cache(maxsize=1)
def world():
    """Returns centres and labelling rules of the domains."""
    g = torch.Generator().manual_seed(0)
    centres = 2.0 * torch.randn(DOMAINS, WIDTH, generator=g)
    rules = torch.randn(DOMAINS, WIDTH, CLASSES, generator=g)
    return centres, rules


@pytest.fixture(autouse=True)
def one_thread():
    """Uses one thread, because more threads than cores slow each other down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def draw(count, seed, domain=None, shift=0):
    g = torch.Generator().manual_seed(seed)
    centres, rules = world()
    which = torch.randint(DOMAINS, (count,), generator=g) if domain is None else None
    which = torch.full((count,), domain) if which is None else which
    noise = torch.randn(count, WIDTH, generator=g)
    labels = torch.einsum("bw,bwc->bc", noise, rules[which]).argmax(dim=1)
    return centres[which] + noise, (labels + shift) % CLASSES, which


def mlp(outputs, seed, hidden=HIDDEN):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


def minimise(module, loss, steps=STEPS, rate=5e-3, seed=0):
    optimiser = torch.optim.Adam(module.parameters(), lr=rate)
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(g).backward()
        optimiser.step()
    return module


@functools.lru_cache(maxsize=1)
def expert_weights():
    found = []
    for domain in range(DOMAINS):
        x, y, _ = draw(1000, 10 + domain, domain)
        expert = mlp(CLASSES, domain)
        minimise(expert, lambda g, e=expert, x=x, y=y: functional.cross_entropy(e(x), y), steps=200)
        found.append(expert.state_dict())
    return found


def experts(*, useless=False):
    built = {}
    for i, weights in enumerate([None, *expert_weights()] if useless else expert_weights()):
        expert = mlp(CLASSES, 50 + i)
        if weights is not None:
            expert.load_state_dict(weights)
        torch.manual_seed(70 + i)
        expert[2] = nn.Linear(HIDDEN, CLASSES)  # a new head
        nn.init.normal_(expert[2].weight, std=0.01)
        nn.init.zeros_(expert[2].bias)
        built[f"expert{i}"] = expert
    return built


def fresh_router(count, seed, bias):
    router = mlp(2 * count, 90 + seed)
    nn.init.zeros_(router[2].weight)
    nn.init.zeros_(router[2].bias)
    router[2].bias.data[0] = bias
    return router


def train_hub(*, seed=0, bias=0.0, loss=None, useless=False, **routes):
    routes = RouteConfig(**{"k": 2, **routes})
    count = DOMAINS + useless
    router = Preference(count) if routes.by == "static" else fresh_router(count, seed, bias)
    hub = HubPathway(experts(useless=useless), router, num_classes=CLASSES, routes=routes)
    x, y, _ = draw(500, 1000 + seed, shift=1)
    config = loss or HubLossConfig()

    def step(g):
        rows = torch.randint(len(x), (64,), generator=g)
        draws = torch.randn(64, count, generator=g)
        paths = Paths(*hub(x[rows], draws, detailed=True))
        return hub_loss(*paths[:3], paths.p_BM, y[rows], config)[0]

    return minimise(hub, step, seed=seed).eval()


@torch.no_grad()
def figures(hub):
    """Returns accuracy, share of samples routed to their domain's expert, entropy of the load."""
    x, y, which = draw(2000, 5, shift=1)
    which = which + len(hub.experts) - DOMAINS
    paths = Paths(*hub(x, detailed=True))
    own = paths.active_BM[torch.arange(len(x)), which].float().mean()
    load = paths.active_BM.float().mean(dim=0)
    load = load / load.sum()
    entropy = -torch.special.xlogy(load, load).sum() / math.log(len(load))
    accuracy = (paths.logits_BC.argmax(dim=1) == y).float().mean()
    return float(accuracy), float(own), float(entropy), paths.weight_BM.mean(dim=0)


@torch.no_grad()
def accuracy(predict):
    x, y, _ = draw(2000, 5, shift=1)
    return float((predict(x).argmax(dim=1) == y).float().mean())


def test_samples_are_routed_to_their_domains_expert_and_the_hub_beats_singles_and_ensemble():
    found, own, _, _ = figures(train_hub())
    x, y, _ = draw(500, 1000, shift=1)
    singles = []
    for expert in experts().values():

        def step(g, expert=expert):
            rows = torch.randint(len(x), (64,), generator=g)
            return functional.cross_entropy(expert(x[rows]), y[rows])

        singles.append(minimise(expert, step))
    assert own > 0.95
    assert found > max(map(accuracy, singles)) + 0.02
    assert found > accuracy(lambda x: sum(s(x).softmax(dim=1) for s in singles)) + 0.02


def test_one_expert_per_sample_works_with_the_dense_gate():
    found, own, entropy, _ = figures(train_hub(k=1))
    assert own > 0.95
    assert entropy > 0.95
    assert found > figures(train_hub(k=1, by="static"))[0] + 0.1


NOTHING = HubLossConfig(explore=0.0)


def test_a_collapsed_router_recovers():
    _, own, entropy, _ = figures(train_hub(bias=6.0))
    assert own > 0.95
    assert entropy > 0.95


def test_noise_alone_corrects_a_smaller_bias_and_exploration_alone_spreads_the_load():
    _, own, _, _ = figures(train_hub(bias=3.0, loss=NOTHING))
    assert own > 0.95
    # Even usage is not correct usage: without noise, few samples are routed to their own expert.
    weights = figures(train_hub(bias=6.0, noise=False))[3]
    assert weights.max() < 0.3


@pytest.mark.parametrize("bias", [3.0, 6.0])
def test_without_noise_and_exploration_a_collapsed_router_stays_worse(bias):
    found, own, _, weights = figures(train_hub(bias=bias, noise=False, loss=NOTHING))
    assert own < 0.8
    assert weights.max() > 0.3
    assert found < figures(train_hub(bias=bias))[0] - 0.03


def test_an_uninformative_expert_loses_weight():
    _, own, _, weights = figures(train_hub(useless=True))
    assert own > 0.95
    assert weights[0] < 1 / (DOMAINS + 1)
