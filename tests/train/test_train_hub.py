"""A hub from its experts' files to its own: any ranks, any interruption, each bit accounted for."""

from unittest import mock

import pytest
import safetensors.torch
import torch
from test_train_stage import losses_in, run_on
from torch.nn import functional

from dist_tl.errors import CheckpointMismatchError, ConfigError
from dist_tl.methods.hub.losses import HubLossConfig
from dist_tl.methods.hub.pathway import HubPathway, Paths
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.files import load_network
from dist_tl.models.inputs import InputConfig
from dist_tl.models.networks import Network, build_network
from dist_tl.models.resnet import ResNetConfig
from dist_tl.storage import layout
from dist_tl.storage.model_files import read_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.train import hub_model, objectives
from dist_tl.train.cached import CachedExpert, CachedFeatures, CachedHub
from dist_tl.train.hub_model import (
    HUB_TENSORS,
    ExpertSource,
    NewExpert,
    NewHub,
    build_expert,
    hub_files,
    load_expert,
    load_hub,
    load_router,
)
from dist_tl.train.models import build_model, model_files
from dist_tl.train.objectives import HubSpec, SupervisedSpec
from dist_tl.train.rows import load_rows

SHAPE, CLASSES, EXPERTS = (1, 8, 8), 3, ("plain", "wide", "deep")
MAKES = {
    "plain": {"width": 4, "blocks": (1, 1)},
    "wide": {"width": 6, "blocks": (1,)},
    "deep": {"width": 2, "blocks": (1, 1)},
}


def put(store, place, files):
    for name, data in files.items():
        store.write(f"{place}/{name}", data)


def rng(seed):
    return torch.Generator().manual_seed(seed)


def images(rows=20, seed=1):
    return torch.rand(rows, *SHAPE, generator=rng(seed)) * 2 - 1


def pretrained(name, *, norm="group", shape=SHAPE):
    """An expert that knows five other classes; its statistics are not those of a fresh one."""
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


def stirred(module, seed=3):
    """Weights away from where they start, where all routes are even."""
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


@pytest.fixture
def place(tmp_path):
    """Places of runs that hold the experts, by name."""

    def with_experts(name, *, norm="group"):
        url = str(tmp_path / name)
        store_experts(url, norm=norm)
        return url

    return with_experts


@pytest.fixture
def hub_stage(stage_spec):
    """Makes the specification of a stage that trains a hub; without losses of its own."""

    def make(model, **fields):
        loss = HubLossConfig(explore=0.0, exploit=0.0)
        fields = {"name": "hub-seed0", "objective": HubSpec(loss=loss), **fields}
        return stage_spec(model=model, **fields)

    return make


def hub_in(url, spec):
    """The stored files, by name."""
    store, prefix = ObjectStore(url), layout.stage_model_prefix(spec.name)
    return {key.removeprefix(f"{prefix}/"): store.read(key) for key in store.list(prefix)}


# Ranks.


def routes_on(rank, world_size, spec, url):
    """Run a stage; the experts that this rank's samples chose, a set for every step."""
    chosen, hub_loss = [], objectives.hub_loss

    def remembered(logits, expert_logits, active_BM, *rest):
        chosen.append(set(active_BM.any(dim=0).nonzero().flatten().tolist()))
        return hub_loss(logits, expert_logits, active_BM, *rest)

    with mock.patch.object(objectives, "hub_loss", remembered):
        run_on(rank, world_size, spec, url)
    return chosen


@pytest.mark.parametrize("by", ["input", "static", "random"])
def test_ranks_with_different_experts_finish_and_zero_stages_agree_with_each_other_and_one_rank(
    alone, two_ranks, hub_stage, place, by
):
    """The noise is drawn by lane, so the same samples choose the same experts on any rank."""
    model = new_hub(k=1, by=by)
    one = hub_stage(model, batch_size=4)
    [whole] = [routes_on(0, 1, one, place("one"))]
    expected, found = state_of(load_hub(ObjectStore(place("one")), "stages/hub-seed0/model")), []
    for zero_stage in range(4):
        spec = hub_stage(model, batch_size=4, engine={"zero_stage": zero_stage})
        url = place(f"zero{zero_stage}")
        left, right = two_ranks(routes_on, spec, url)
        assert [a | b for a, b in zip(left, right, strict=True)] == whole
        assert any(a != b for a, b in zip(left, right, strict=True))
        assert losses_in(url, spec) == pytest.approx(losses_in(place("one"), one), rel=1e-4)
        weights = state_of(load_hub(ObjectStore(url), "stages/hub-seed0/model"))
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], atol=2e-3, rtol=0, msg=name)
            torch.testing.assert_close(value, (found or [weights])[0][name], msg=name)
        found.append(weights)


def test_routes_without_noise_are_the_same_on_one_rank_and_two(alone, two_ranks, hub_stage, place):
    model = new_hub(k=2, noise=False, warm="warm")
    urls = [place("one"), place("two")]
    warm = build(new_hub(k=2, noise=False), urls[0])
    stirred(warm)
    for url in urls:
        put(ObjectStore(url), "warm", cached_twin(warm))
    spec = hub_stage(model)
    whole = routes_on(0, 1, spec, urls[0])
    left, right = two_ranks(routes_on, spec, urls[1])
    assert [a | b for a, b in zip(left, right, strict=True)] == whole
    assert any(a != b for a, b in zip(left, right, strict=True))
    assert losses_in(urls[1], spec) == pytest.approx(losses_in(urls[0], spec), rel=1e-4)


# Stopping and going on.


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_killed_hub_goes_on_to_the_very_same_files(ranks, hub_stage, place, zero_stage):
    loss = HubSpec(loss=HubLossConfig())
    spec = hub_stage(new_hub(k=2), objective=loss, engine={"zero_stage": zero_stage})
    [whole, *_] = ranks(run_on, spec, place("whole"))
    assert set(ranks(run_on, spec, place("killed"), 3)) == {None}
    [resumed, *_] = ranks(run_on, spec, place("killed"))
    assert hub_in(place("killed"), spec) == hub_in(place("whole"), spec)
    assert resumed.predictions == whole.predictions
    assert resumed.final_loss == whole.final_loss


@pytest.mark.parametrize(
    "experts", [("wide", "plain", "deep"), ("plain", "wide"), ("plain", "wide", "wide2")]
)
def test_another_order_or_set_of_experts_cannot_go_on(alone, hub_stage, place, experts):
    url = place("run")
    run_on(0, 1, hub_stage(new_hub(k=2)), url, 3)
    sources = tuple(source(n, model=f"experts/{n.removesuffix('2')}") for n in experts)
    with pytest.raises(CheckpointMismatchError, match="another job"):
        run_on(0, 1, hub_stage(new_hub(k=2, sources=sources)), url)


def test_what_is_reported_is_what_the_stored_hub_says(ranks, hub_stage, part_of_digits, place):
    spec, url = hub_stage(new_hub(k=2)), place("run")
    [result, *_] = ranks(run_on, spec, url)
    hub = load_hub(ObjectStore(url), layout.stage_model_prefix(spec.name))
    with torch.no_grad():
        answers = hub(load_rows(part_of_digits("test")).tensor()).argmax(dim=1)
    assert result.predictions == tuple(answers.tolist())


# Running statistics.


def statistics(store, place):
    network = load_network(read_model_files(store, place))
    return {name: b for name, b in network.named_buffers() if "running" in name}


@pytest.mark.parametrize("engine", [{}, {"zero_stage": 3, "precision": "bf16"}])
def test_frozen_statistics_are_those_of_the_experts_files_bit_for_bit(
    ranks, hub_stage, place, engine
):
    url = place("run", norm="batch")
    spec = hub_stage(new_hub(k=1), engine=engine, ema_decay=0.5)
    ranks(run_on, spec, url)
    store, model = ObjectStore(url), layout.stage_model_prefix(spec.name)
    for name in EXPERTS:
        before = statistics(store, f"experts/{name}")
        assert before
        assert_equal_states(statistics(store, f"{model}/experts/{name}"), before)
        trained, old = load_expert(store, model, name), pretrained(name, norm="batch")
        assert not torch.equal(trained.trunk.norm.weight, old.trunk.norm.weight)


def test_trained_statistics_move(alone, hub_stage, place):
    url = place("run", norm="batch")
    spec = hub_stage(new_hub(k=3, batchnorm="train"))
    run_on(0, 1, spec, url)
    store = ObjectStore(url)
    before = statistics(store, "experts/plain")
    after = statistics(store, f"{layout.stage_model_prefix(spec.name)}/experts/plain")
    assert not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("by", ["input", "static", "random"])
def test_a_hub_learns_in_half_precision_with_accumulated_micro_batches(ranks, hub_stage, place, by):
    engine = {"precision": "bf16", "zero_stage": 3, "accumulation": 2}
    fields = {"batch_size": 16, "steps": 30, "every_steps": 0, "engine": engine}
    spec = hub_stage(new_hub(k=2, by=by), objective=HubSpec(loss=HubLossConfig()), **fields)
    url = place("run")
    ranks(run_on, spec, url)
    losses = losses_in(url, spec)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_a_hub_is_trained_by_the_objective_of_its_kind_and_no_other_model_is(hub_stage):
    with pytest.raises(ValueError, match="objective hub goes with a model of kind hub"):
        hub_stage(new_hub(k=1), objective=SupervisedSpec())
    with pytest.raises(ValueError, match="objective hub goes with a model of kind hub"):
        hub_stage(NewExpert(expert=source("plain"), num_classes=CLASSES))


# Files.


def some_hub(url, **routes):
    """A hub of a plain expert, one for coloured larger images, and one cut open at a block."""
    coloured = pretrained("wide", shape=(3, 10, 10))
    put(ObjectStore(url), "coloured", model_files(coloured))
    inputs = InputConfig(resize=10, grey_to_rgb=True)
    sources = (
        source("plain"),
        source("coloured", model="coloured", inputs=inputs),
        source("cut", model="experts/deep", tap=0),
        source("library", model=None, network=ResNetConfig(width=2, blocks=(1,))),
    )
    return stirred(build(new_hub(sources=sources, **routes), url))


@pytest.mark.parametrize("by", ["input", "static", "random"])
def test_a_stored_hub_comes_back_with_the_same_routes_and_logits_bit_for_bit(place, by):
    url = place("run")
    hub = some_hub(url, k=2, by=by).eval()
    put(ObjectStore(url), "hub", hub_files(hub))
    again = load_hub(ObjectStore(url), "hub")
    assert (again.routes, again.batchnorm, list(again.experts)) == (
        hub.routes,
        "frozen",
        ["plain", "coloured", "cut", "library"],
    )
    with torch.no_grad():
        left, right = (Paths(*module(images(), detailed=True)) for module in (hub, again))
    for one, two in zip(left, right, strict=True):
        assert torch.equal(one, two)
    assert by == "static" or len(left.active_BM.unique(dim=0)) > 1
    assert hub_files(again) == hub_files(hub)


def test_preprocessing_and_the_tap_do_what_they_say(place):
    hub = some_hub(place("run"), k=2).eval()
    x = images(5)
    wanted = functional.interpolate(x, size=(10, 10), mode="bilinear", antialias=True)
    coloured, cut = hub.experts["coloured"], hub.experts["cut"]
    base = coloured.trunk.base(wanted.expand(-1, 3, -1, -1))
    assert torch.equal(coloured.features(x), base)
    block = pretrained("deep").eval().blocks(x)[0].mean(dim=(2, 3))
    assert cut.num_features == block.shape[1]
    fresh = build_expert(
        source("cut", model="experts/deep", tap=0),
        ObjectStore(place("run")),
        num_classes=CLASSES,
        image_shape=SHAPE,
        seed=0,
    ).eval()
    torch.testing.assert_close(fresh.features(x), functional.normalize(block))


def test_one_expert_is_read_without_the_others_and_the_router_without_any(place):
    url = place("run")
    hub, store = some_hub(url, k=2).eval(), ObjectStore(url)
    put(store, "hub", hub_files(hub))
    for name in ("plain", "coloured", "library"):
        store.delete_all(f"hub/experts/{name}/")
    cut = load_expert(store, "hub", "cut")
    assert not cut.training
    assert torch.equal(cut(images()), hub.experts["cut"](images()))
    store.delete_all("hub/experts/cut/")
    rest = load_router(store, "hub")
    assert torch.equal(rest.router(images()), hub.router(images()))
    assert torch.equal(rest.aggregator.weight, hub.aggregator.weight)
    with pytest.raises(ConfigError, match="no expert tree; it has plain, coloured, cut, library"):
        load_expert(store, "hub", "tree")
    with pytest.raises(ConfigError, match="no model at"):
        load_hub(store, "hub")


@pytest.mark.parametrize("where", [".", "url", "relative"])
def test_a_hub_is_found_in_the_folder_itself_and_by_url(place, tmp_path, monkeypatch, where):
    """As the card beside every exported hub says: load_hub(ObjectStore(FOLDER), '.')."""
    url = place("run")
    hub = build(new_hub(k=2), url).eval()
    put(ObjectStore(tmp_path), "hub", hub_files(hub))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store, at = {
        ".": (ObjectStore(tmp_path / "hub"), "."),
        "url": (ObjectStore(url), f"file://{tmp_path}/hub"),
        "relative": (ObjectStore(url), "../hub"),
    }[where]
    assert torch.equal(load_hub(store, at)(images()), hub(images()))


def test_a_hub_that_is_damaged_or_another_is_refused_by_name(place):
    store = ObjectStore(place("run"))
    hub = build(new_hub(k=2), store.url)
    put(store, "hub", hub_files(hub))
    small = build(new_hub(("plain", "wide"), k=2), store.url)
    store.write("hub/hub.safetensors", hub_files(small)["hub.safetensors"])
    with pytest.raises(ConfigError, match=r"another hub: aggregator\.weight differs"):
        load_hub(store, "hub")
    store.write("hub/hub.safetensors", b"junk")
    with pytest.raises(ConfigError, match=r"hub\.safetensors is damaged"):
        load_hub(store, "hub")
    store.write("hub/hub.json", b"{}")
    with pytest.raises(ConfigError, match=r"hub\.json is damaged"):
        load_hub(store, "hub")


# Experts that cannot be used.


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"model": "experts/none"}, "no model at .*experts/none"),
        ({"model": None}, "exactly one of model"),
        ({"network": ResNetConfig()}, "exactly one of model"),
        ({"tap": 40}, "blocks .40.: there are blocks 0 to"),
        ({"inputs": InputConfig(resize=16)}, r"\(1, 8, 8\), and is given \(1, 16, 16\)"),
        ({"inputs": InputConfig(grey_to_rgb=True)}, r"\(1, 8, 8\), and is given \(3, 8, 8\)"),
        ({"model": "coloured"}, r"\(3, 10, 10\), and is given \(1, 8, 8\)"),
        ({"model": "adapted", "inputs": InputConfig(resize=8)}, "adapted already"),
        ({"model": "adapted", "tap": 0}, "kind adapted cannot be cut"),
        ({"model": "cut", "tap": 0}, "kind layer_set cannot be cut"),
        ({"model": None, "network": ResNetConfig(blocks=(1, 1, 1, 1, 1))}, "fewer stages"),
    ],
)
def test_an_expert_that_cannot_be_used_is_named_with_the_reason(place, fields, told):
    url = place("run")
    hub = some_hub(url, k=2)
    for name, kind in (("coloured", "adapted"), ("cut", "cut")):
        put(ObjectStore(url), kind, model_files(hub.experts[name]))
    bad = source("plain").model_copy(update=fields)
    for spec in (
        new_hub(sources=(source("wide"), bad), k=1),
        NewExpert(expert=bad, num_classes=CLASSES),
    ):
        with pytest.raises(ConfigError, match=rf"expert plain: .*{told}"):
            build(spec, url)


@pytest.mark.parametrize("name", ["values", "half", "cpu", "train", "training", "pop"])
def test_a_name_that_torch_keeps_for_itself_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}.*another name"):
        source(name)


# Warm starts.


def columns(networks):
    offset, found = SHAPE[1] * SHAPE[2], []
    for name, network in networks.items():
        found.append(CachedFeatures(name=name, offset=offset, width=network.num_features))
        offset += network.num_features
    return tuple(found)


def rows_of(networks, x):
    """Images with what every frozen trunk makes of them, as cached rows are."""
    with torch.no_grad():
        parts = [network.eval().features(x) for network in networks.values()]
    return torch.cat([x.flatten(1), *parts], dim=1)[:, :, None, None]


def cached(url, seed=11, **routes):
    """A hub on cached features, and the experts whose features they are."""
    store = ObjectStore(url)
    networks = {
        name: build_expert(source(name), store, num_classes=CLASSES, image_shape=SHAPE, seed=seed)
        for name in EXPERTS
    }
    spec = CachedHub(hub=new_hub(**routes), features=columns(networks), image_shape=SHAPE)
    return build(spec, url, seed), networks


def cached_twin(hub):
    """The warm start that would leave the head, router and aggregator of `hub`."""
    parts = ("router.", "aggregator.")
    own = {n: t for n, t in hub.state_dict().items() if n.startswith(parts) or ".head." in n}
    return {HUB_TENSORS: safetensors.torch.save({n: t.clone() for n, t in own.items()})}


def learn(module, x, y, draws, steps=4):
    """Plain gradient descent on what can be learnt, by the whole loss."""
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
def test_learning_on_cached_features_is_learning_with_frozen_trunks(place, by):
    url, x = place("run"), images(24)
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
def test_a_hub_takes_its_warm_start_over_bit_for_bit_and_keeps_the_trunks(place, by):
    url = place("run")
    light, _ = cached(url, k=2, by=by)
    put(ObjectStore(url), "warm", model_files(stirred(light)))
    hub, cold = (build(new_hub(k=2, by=by, warm=warm), url) for warm in ("warm", None))
    trained = {n.replace("router.router", "router"): t for n, t in light.state_dict().items()}
    for name, value in hub.state_dict().items():
        fixed = ".trunk." in name and name.startswith("experts.")
        assert (name not in trained) == fixed, name
        assert torch.equal(value, cold.state_dict()[name] if fixed else trained[name]), name
        assert fixed or not torch.equal(value, cold.state_dict()[name]), name


def test_an_expert_takes_its_warm_head_over_bit_for_bit(place):
    url, x = place("run"), images()
    spec = NewExpert(expert=source("wide"), num_classes=CLASSES)
    alone = build(spec, url)
    features = columns({"wide": alone})[0]
    head = build(CachedExpert(features=features, num_classes=CLASSES), url)
    rows = rows_of({"wide": alone}, x)
    torch.testing.assert_close(head(rows), alone.eval()(x), atol=1e-5, rtol=0)
    put(ObjectStore(url), "warm", model_files(stirred(head)))
    warm = build(spec.model_copy(update={"warm": "warm"}), url)
    assert_equal_states(state_of(warm.head), state_of(head.head))
    assert_equal_states(state_of(warm.trunk), state_of(alone.trunk))


def test_a_warm_start_of_another_hub_is_refused(place):
    url = place("run")
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
    """A trunk as libraries make them: a part called head, a buffer not saved, a weight shared."""

    def __init__(self, trunk):
        super().__init__()
        self.head = trunk
        self.register_buffer("passing", torch.zeros(2), persistent=False)
        self.one = torch.nn.Linear(2, 2)
        self.two = torch.nn.Linear(2, 2)
        self.two.weight = self.one.weight

    def forward(self, x):
        return self.head(x)


def test_a_warm_start_knows_heads_from_parts_of_trunks_that_are_called_so(place, monkeypatch):
    url = place("run")
    make = hub_model.build_network

    def unusual(*arguments, **fields) -> Network:
        network = make(*arguments, **fields)
        network.trunk = Unusual(network.trunk)
        return network

    def unusual_load(files):
        network = load_network(files)
        network.trunk = Unusual(network.trunk)
        return network

    monkeypatch.setattr(hub_model, "build_network", unusual)
    monkeypatch.setattr(hub_model, "load_network", unusual_load)
    light, _ = cached(url, k=2)
    put(ObjectStore(url), "warm", model_files(stirred(light)))
    hub = build(new_hub(k=2, warm="warm"), url)
    assert isinstance(hub, HubPathway)
    for name in EXPERTS:
        assert torch.equal(hub.experts[name].head.weight, light.experts[name].head.weight)
    assert torch.equal(hub.router.head.weight, light.router.router.head.weight)
