"""Files of a hub: round trip, partial reads, and invalid experts."""

import pytest
import safetensors.torch
import torch
from small_hubs import (
    CLASSES,
    SHAPE,
    build,
    images,
    new_hub,
    perturbed,
    pretrained,
    put,
    source,
)
from torch.nn import functional

from dist_tl.errors import ConfigError
from dist_tl.methods.hub.pathway import Paths
from dist_tl.models.inputs import InputConfig
from dist_tl.models.resnet import ResNetConfig
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import (
    NewExpert,
    build_expert,
    hub_files,
    load_expert,
    load_hub,
    load_router,
)
from dist_tl.train.models import model_files


def some_hub(url, **routes):
    """A hub with a plain expert, one for larger RGB images, one with a tap, one of a library."""
    coloured = pretrained("wide", shape=(3, 10, 10))
    put(ObjectStore(url), "coloured", model_files(coloured))
    inputs = InputConfig(resize=10, grey_to_rgb=True)
    sources = (
        source("plain"),
        source("coloured", model="coloured", inputs=inputs),
        source("cut", model="experts/deep", tap=0),
        source("library", model=None, network=ResNetConfig(width=2, blocks=(1,))),
    )
    return perturbed(build(new_hub(sources=sources, **routes), url))


@pytest.mark.parametrize("by", ["input", "static", "random"])
def test_a_loaded_hub_has_the_same_routes_and_logits_bit_for_bit(run_url, by):
    url = run_url("run")
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


def test_preprocessing_and_tap_equal_a_manual_computation(run_url):
    hub = some_hub(run_url("run"), k=2).eval()
    x = images(5)
    wanted = functional.interpolate(x, size=(10, 10), mode="bilinear", antialias=True)
    coloured, cut = hub.experts["coloured"], hub.experts["cut"]
    base = coloured.trunk.base(wanted.expand(-1, 3, -1, -1))
    assert torch.equal(coloured.features(x), base)
    block = pretrained("deep").eval().blocks(x)[0].mean(dim=(2, 3))
    assert cut.num_features == block.shape[1]
    fresh = build_expert(
        source("cut", model="experts/deep", tap=0),
        ObjectStore(run_url("run")),
        num_classes=CLASSES,
        image_shape=SHAPE,
        seed=0,
    ).eval()
    torch.testing.assert_close(fresh.features(x), functional.normalize(block))


def test_an_expert_is_read_without_the_others_and_the_router_without_experts(run_url):
    url = run_url("run")
    hub, store = some_hub(url, k=2).eval(), ObjectStore(url)
    put(store, "hub", hub_files(hub))
    for name in ("plain", "coloured", "library"):
        store.delete_all(f"hub/experts/{name}/")
    cut = load_expert(store, "hub", "cut")
    assert not cut.training
    assert torch.equal(cut(images()), hub.experts["cut"](images()))
    store.delete_all("hub/experts/cut/")
    parts = load_router(store, "hub")
    assert torch.equal(parts.router(images()), hub.router(images()))
    assert torch.equal(parts.aggregator.weight, hub.aggregator.weight)
    with pytest.raises(ConfigError, match="no expert tree; it has plain, coloured, cut, library"):
        load_expert(store, "hub", "tree")
    with pytest.raises(ConfigError, match="no model at"):
        load_hub(store, "hub")


@pytest.mark.parametrize("kind", [".", "url", "relative"])
def test_a_hub_is_loaded_from_its_own_folder_and_by_url(run_url, tmp_path, monkeypatch, kind):
    """The card of an exported hub documents: load_hub(ObjectStore(FOLDER), '.')."""
    url = run_url("run")
    hub = build(new_hub(k=2), url).eval()
    put(ObjectStore(tmp_path), "hub", hub_files(hub))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store, location = {
        ".": (ObjectStore(tmp_path / "hub"), "."),
        "url": (ObjectStore(url), f"file://{tmp_path}/hub"),
        "relative": (ObjectStore(url), "../hub"),
    }[kind]
    assert torch.equal(load_hub(store, location)(images()), hub(images()))


def test_a_damaged_or_mixed_hub_is_rejected_by_name(run_url):
    store = ObjectStore(run_url("run"))
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


@pytest.mark.parametrize(
    ("file", "tensor"),
    [
        ("hub.safetensors", "aggregator.bias"),
        ("router/model.safetensors", "head.bias"),
        ("experts/wide/model.safetensors", "head.bias"),
    ],
)
def test_a_hub_whose_weights_are_not_finite_is_rejected_by_file_and_tensor(run_url, file, tensor):
    store = ObjectStore(run_url("run"))
    put(store, "hub", hub_files(build(new_hub(("plain", "wide"), k=2), store.url)))
    tensors = safetensors.torch.load(store.read(f"hub/{file}"))
    tensors[tensor][0] = float("nan")
    store.write(f"hub/{file}", safetensors.torch.save(tensors))
    with pytest.raises(ConfigError, match=rf"hub/{file}: {tensor}: expected finite numbers"):
        load_hub(store, "hub")


# Invalid experts.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "experts/none"}, "no model at .*experts/none"),
        ({"model": None}, "exactly one of model"),
        ({"network": ResNetConfig()}, "exactly one of model"),
        ({"tap": 40}, "blocks .40.: expected blocks 0 to"),
        ({"inputs": InputConfig(resize=16)}, r"\(1, 8, 8\), got \(1, 16, 16\)"),
        ({"inputs": InputConfig(grey_to_rgb=True)}, r"\(1, 8, 8\), got \(3, 8, 8\)"),
        ({"model": "coloured"}, r"\(3, 10, 10\), got \(1, 8, 8\)"),
        ({"model": "adapted", "inputs": InputConfig(resize=8)}, "already has inputs"),
        ({"model": "adapted", "tap": 0}, "kind adapted cannot take a head"),
        ({"model": "cut", "tap": 0}, "kind layer_set cannot take a head"),
        ({"model": None, "network": ResNetConfig(blocks=(1, 1, 1, 1, 1))}, "fewer stages"),
    ],
)
def test_an_invalid_expert_is_named_with_the_reason(run_url, fields, message):
    url = run_url("run")
    hub = some_hub(url, k=2)
    for name, kind in (("coloured", "adapted"), ("cut", "cut")):
        put(ObjectStore(url), kind, model_files(hub.experts[name]))
    bad = source("plain").model_copy(update=fields)
    for spec in (
        new_hub(sources=(source("wide"), bad), k=1),
        NewExpert(expert=bad, num_classes=CLASSES),
    ):
        with pytest.raises(ConfigError, match=rf"expert plain: .*{message}"):
            build(spec, url)


@pytest.mark.parametrize("name", ["values", "half", "cpu", "train", "training", "pop"])
def test_a_name_of_a_torch_attribute_is_rejected(name):
    with pytest.raises(ValueError, match=f"{name}.*another name"):
        source(name)
