"""Specifications and plans of hub and predict jobs: what they accept, refuse and count."""

import json

import pytest
import torch
import yaml

from dist_tl.config import fingerprint
from dist_tl.errors import ConfigError
from dist_tl.jobs.hub.cost import hub_rows
from dist_tl.jobs.hub.plan import HubPlan
from dist_tl.jobs.job_file import read_job
from dist_tl.jobs.plan import plan_job
from dist_tl.jobs.predict.plan import plan as plan_predictions
from dist_tl.methods.hub.cost import multiply_adds
from dist_tl.methods.hub.counting import hub_multiply_adds
from dist_tl.methods.hub.routes import RouteConfig
from dist_tl.models.files import save_network
from dist_tl.models.networks import build_network, parameter_count
from dist_tl.models.perceptron import PerceptronConfig
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import ExpertSource, NewHub, build_hub, hub_files

CLASSES = [0, 1, 2]
DIGITS = {"source": "digits", "classes": CLASSES}


def trained(name, hidden=5, **fields):
    return {
        "name": name,
        "train": {
            "data": {**DIGITS, "part": {"index": 0, "of": 2}},
            "network": {"kind": "perceptron", "hidden": hidden},
            "training": {"steps": 2, "batch_size": 8},
        },
        **fields,
    }


def hub_job(**changes):
    job = {
        "kind": "hub",
        "hub": [trained("small", 5), trained("large", 11)],
        "target": {
            "data": {**DIGITS, "part": {"index": 1, "of": 2}},
            "labels_per_class": 8,
            "training": {"steps": 2, "batch_size": 8},
        },
        "seeds": 2,
        "router": {"kind": "perceptron", "hidden": 4},
        "arms": ["best_single", {"name": "hub_k1", "routes": {"k": 1}}],
    }
    return {**job, **changes}


def with_target(**changes):
    return hub_job(target={**hub_job()["target"], **changes})


def with_arm(**arm):
    return hub_job(arms=["best_single", arm])


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Reads a job from a mapping, as from a file in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def read_one(job):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({"run": "run", **job}))
        return read_job(path)

    return read_one


@pytest.fixture
def plan(read, tmp_path):
    """The plan of a job, from a mapping."""
    return lambda job: HubPlan(read(job), ObjectStore(tmp_path / "run"))


def assert_refused(job, told, read, tmp_path):
    """Before anything is written, whoever looks at the job."""
    with pytest.raises(ConfigError, match=told):
        plan_job(read(job))
    assert not (tmp_path / "run").exists()


# What can be planned.


def test_the_preset_can_be_planned():
    job = read_job("launch/presets/hub.yaml")
    table = plan_job(job)
    assert {row.phase: row.tasks for row in table.tasks} == {
        "cached features": 5,
        "cached rows": 10,
        "evaluation": 30,
        "timing": 1,
    }
    names = [row.stage for row in table.train]
    assert len(names) == len(set(names))
    # 5 experts; of each seed 5 picks, 5 singles, 6 arms with a model; all but the distilled warm
    # up, picks too.
    assert len(names) == 5 + 5 * ((5 + 5 + 6) + (5 + 5 + 5))
    assert [row[0] for row in table.tables[0].rows][:6] == [*(e.name for e in job.hub), "router"]


def test_a_job_without_a_warm_start_has_no_cached_features(read):
    table = plan_job(read(hub_job(arms=["best_single", "ensemble", "distilled"])))
    assert [row.phase for row in table.tasks] == ["evaluation", "timing"]
    assert [row.stage for row in table.train] == [
        "expert-small",
        "expert-large",
        *(
            f"{name}-seed{seed}"
            for seed in range(2)
            for name in ("pick-small", "pick-large", "single-small", "single-large", "distilled")
        ),
    ]


def test_planning_starts_and_writes_nothing(read, tmp_path):
    plan_job(read(hub_job()))
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def test_arms_of_a_repeat_share_labels_and_test_split_and_picks_never_see_the_test_split(plan):
    found = plan(hub_job())
    [single, _], [pick, _] = found.singles(1), found.singles(1, pick=True)
    [arm] = found.arms(1, best="small")
    assert (arm.labelled, arm.evaluate, arm.seed) == (
        single.labelled,
        single.evaluate,
        single.seed,
    )
    assert single.labelled != found.singles(0)[0].labelled
    assert single.evaluate.split.part == "test"
    for rows in (pick.labelled, pick.evaluate):
        assert rows.split == single.labelled.split
    assert pick.labelled.fold.held_out is False
    assert pick.evaluate.fold.held_out is True


def test_a_short_name_is_an_arm_of_that_route(read):
    job = read(hub_job(arms=["best_single", {"name": "mean", "route": "ensemble"}]))
    assert [(arm.name, arm.route) for arm in job.arms] == [
        ("best_single", "best_single"),
        ("mean", "ensemble"),
    ]


def test_a_catalogue_by_its_path_is_the_list_itself(read, tmp_path):
    inline = hub_job()
    (tmp_path / "experts.yaml").write_text(yaml.safe_dump({"hub": inline["hub"]}))
    catalogued = read(hub_job(hub="experts.yaml"))
    assert catalogued == read(inline)
    assert fingerprint(catalogued) == fingerprint(read(inline))
    again = json.loads(catalogued.model_dump_json())
    assert [expert["name"] for expert in again["hub"]] == ["small", "large"]


# What a hub job cannot say.


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (with_arm(name="hub_k3", routes={"k": 3}), r"arm hub_k3: routes\.k: expected 1 to 2 .*3"),
        (with_arm(name="hub_k0", routes={"k": 0}), r"arms\.1\.routes\.k"),
        (with_arm(name="a", routes={"k": 1, "gate": "topk"}), r"arms\.1\.routes: gate topk.*dense"),
        (with_arm(name="a", routes={"by": "chance"}), r"arms\.1\.routes\.by"),
        (with_arm(name="a", route="pathways"), r"arms\.1\.route"),
        (with_arm(name="a", loss={"explore": -1}), r"arms\.1\.loss\.explore"),
        (with_arm(name="best_single", routes={"k": 1}), "arms: two are called best_single"),
        (with_arm(name="single-small", routes={"k": 1}), r"arms?.*single-small.*another name"),
        (with_arm(name="pick-x", routes={"k": 1}), r"arms?.*pick-x.*another name"),
        (with_arm(name="warm-hub", routes={"k": 1}), r"arms?.*warm-hub.*another name"),
        (hub_job(arms=["ensemble"]), "arms: add best_single, the baseline of all comparisons"),
        (hub_job(arms=[]), "arms"),
        (hub_job(hub=[trained("a"), trained("a")]), "hub: two experts are called a"),
        (hub_job(hub=[]), "hub"),
        (hub_job(hub=[{"name": "a"}]), r"hub\.0: expert a: expected exactly one .*got none"),
        (hub_job(hub=[trained("a", model="x")]), "expert a: .*got model and train"),
        (hub_job(hub=[trained("A b")]), r"hub\.0\.name"),
        (
            hub_job(hub=[trained("half")]),
            r"hub\.0\.name: half is an attribute of torch's ModuleDict",
        ),
        (hub_job(hub="nowhere.yaml"), r"hub: cannot read the catalogue nowhere\.yaml: No such"),
        (hub_job(hub="job.yaml"), r"job\.yaml: expected a list under the key hub"),
        (with_target(training={"steps": 2, "batch_size": 9}), r"target\.training: a batch of 9"),
        (
            hub_job(warm_start={"training": {"steps": 2, "batch_size": 12}}),
            r"warm_start\.training: a batch of 12",
        ),
        (hub_job(session={"num_cpus": 2}), r"session\.num_cpus: .*need 3, got 2"),
        (hub_job(validation_folds=1), "validation_folds"),
    ],
)
def test_a_hub_job_that_cannot_work_says_which_field_is_wrong(read, tmp_path, job, told):
    assert_refused(job, told, read, tmp_path)


def test_a_catalogue_that_is_no_yaml_is_refused_by_name(read, tmp_path):
    (tmp_path / "experts.yaml").write_text("hub: [")
    assert_refused(hub_job(hub="experts.yaml"), r"experts\.yaml is not valid YAML", read, tmp_path)


def stored(tmp_path, *, shape=(1, 8, 8), name="stored"):
    network = build_network(
        PerceptronConfig(hidden=3), num_classes=4, image_shape=shape, rng=torch.Generator()
    )
    for key, data in save_network(network).items():
        ObjectStore(tmp_path / name).write(key, data)
    return str(tmp_path / name)


GREY = {"grey_to_rgb": True}


@pytest.mark.parametrize(
    ("expert", "told"),
    [
        ({"name": "b", "model": "/no/such/folder"}, "expert b: no model at /no/such/folder"),
        ({"name": "b", "model": "SMALL"}, r"expert b: expected .*\(1, 6, 6\), got \(1, 8, 8\)"),
        ({"name": "b", "model": "FITS", "inputs": GREY}, r"expert b: .*got \(3, 8, 8\)"),
        ({"name": "b", "model": "FITS", "tap": 3}, r"expert b: layer_set: blocks \[3\]"),
        (trained("b", inputs={"resize": 9}), r"expert b: .*\(1, 8, 8\), but receives \(1, 9, 9\)"),
        (trained("b", inputs=GREY), r"expert b: .*\(1, 8, 8\), but receives \(3, 8, 8\)"),
        (trained("b", tap=9), r"expert b: layer_set: blocks \[9\]"),
        ({"name": "b", "network": {"kind": "resnet", "blocks": [1] * 5}}, "expert b: .*stages"),
    ],
)
def test_an_expert_that_cannot_be_used_is_named_before_anything_starts(
    read, tmp_path, expert, told
):
    places = {"SMALL": stored(tmp_path, shape=(1, 6, 6)), "FITS": stored(tmp_path, name="fits")}
    if expert.get("model") in places:
        expert = {**expert, "model": places[expert["model"]]}
    assert_refused(hub_job(hub=[trained("a"), expert]), told, read, tmp_path)


@pytest.mark.parametrize("warm", [False, True])
def test_inputs_that_a_coloured_target_cannot_have_name_the_expert(read, tmp_path, warm):
    job = with_target(data={**DIGITS, "channels": 3})
    job["hub"] = [trained("a", inputs=GREY)]
    if warm:
        job["warm_start"] = {"training": {"steps": 1, "batch_size": 8}}
    assert_refused(job, "expert a: grey_to_rgb: expected images of 1 channel", read, tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"labels_per_class": 500}, "labels_per_class|class"),
        ({"labels_per_class": 1}, "fold"),
        ({"data": {"source": "digits", "classes": ["ten"]}}, "no class 'ten'"),
        ({"data": {"source": "digits", "size": 9}}, "expert small: it is trained on"),
    ],
)
def test_a_target_that_cannot_be_learnt_is_refused_before_anything_starts(
    read, tmp_path, changes, told
):
    assert_refused(with_target(**changes), told, read, tmp_path)


# Costs, computed here from layer sizes.

PIXELS, C, M = 64, 3, 2
ROUTER = 4
ARMS = [
    "best_single",
    {"name": "all", "routes": {"k": 2}},
    {"name": "hub_k1", "routes": {"k": 1}},
    {"name": "static_k1", "routes": {"k": 1, "by": "static"}},
    {"name": "random_k1", "routes": {"k": 1, "by": "random"}},
]


def cost_rows(found):
    return hub_rows(found.job, found.experts, found.target)


def test_experts_and_router_are_counted_as_computed_here(plan):
    small, large, router, *_ = cost_rows(plan(hub_job(arms=ARMS)))
    assert (small.part, small.parameters) == ("small", 5 * PIXELS + 5 * C + C)
    assert (large.part, large.multiply_adds) == ("large", 11 * PIXELS + 11 * C)
    assert (router.part, router.parameters) == ("router", ROUTER * PIXELS + ROUTER * 2 * M + 2 * M)
    assert router.multiply_adds == ROUTER * PIXELS + ROUTER * 2 * M


def test_a_routed_whole_is_its_parts_an_aggregator_and_the_share_of_experts_that_run(plan):
    rows = {row.part: row for row in cost_rows(plan(hub_job(arms=ARMS)))}
    experts = [rows["small"], rows["large"]]
    parameters = sum(row.parameters for row in experts) + M * C * C + C
    macs = sum(row.multiply_adds for row in experts)
    router = rows["router"]
    assert rows["all (k = 2)"].parameters == parameters + router.parameters
    assert rows["all (k = 2)"].multiply_adds == macs + router.multiply_adds + M * C * C
    assert rows["hub_k1 (k = 1)"].multiply_adds == macs / 2 + router.multiply_adds + M * C * C
    assert rows["static_k1 (k = 1)"].parameters == parameters + 2 * M
    assert rows["random_k1 (k = 1)"].parameters == parameters
    for by in ("static", "random"):
        assert rows[f"{by}_k1 (k = 1)"].multiply_adds == macs / 2 + M * C * C


def test_what_is_planned_is_what_the_built_hubs_have_and_do(plan):
    found = plan(hub_job(arms=ARMS))
    for name, network in found.experts.items():
        for key, data in save_network(network).items():
            found.store.write(f"{layout.stage_model_prefix(f'expert-{name}')}/{key}", data)
    rows = {row.part: row for row in cost_rows(found)}
    for arm in found.job.arms[1:]:
        spec = found.hub(arm, 0)
        hub = build_hub(spec, found.store, image_shape=(1, 8, 8), seed=0)
        row = rows[f"{arm.name} (k = {arm.routes.k})"]
        assert row.parameters == parameter_count(hub)
        even = [arm.routes.k / M] * M
        assert row.multiply_adds == hub_multiply_adds(hub, (1, 8, 8), even)
        if arm.name == "all":
            assert row.multiply_adds == multiply_adds(hub, (1, 8, 8))
        if arm.name == "hub_k1":  # fresh routes are even, so all images go to the first
            assert multiply_adds(hub, (1, 8, 8)) == hub_multiply_adds(hub, (1, 8, 8), [1.0, 0.0])


@pytest.mark.parametrize(
    ("zero_stage", "per_parameter"), [(0, 4.0), (1, 2 + 3 / 2), (2, 1 + 4 / 2), (3, 5 / 2)]
)
def test_bytes_of_training_are_whole_copies_and_a_share_of_the_rest(
    plan, zero_stage, per_parameter
):
    """Two workers: weights, gradients, and from stage 1 on master weights and two moments."""
    [row, *_] = cost_rows(plan(hub_job(engine={"zero_stage": zero_stage})))
    assert row.serving_bytes == 4 * row.parameters
    assert row.training_bytes == 4 * row.parameters * per_parameter


# Predictions.


@pytest.fixture
def hub_folder(tmp_path):
    """A stored hub of two experts for digits."""
    experts = tuple(
        ExpertSource(name=name, network=PerceptronConfig(hidden=3)) for name in ("left", "right")
    )
    spec = NewHub(
        experts=experts,
        router=PerceptronConfig(hidden=2),
        routes=RouteConfig(k=1),
        num_classes=3,
    )
    store = ObjectStore(tmp_path / "other_run")
    hub = build_hub(spec, store, image_shape=(1, 8, 8), seed=0)
    for name, data in hub_files(hub).items():
        store.write(f"models/hub-seed0/{name}", data)
    return str(tmp_path / "other_run/models/hub-seed0")


def predict_job(model, **changes):
    job = {"kind": "predict", "model": model, "data": DIGITS, "samples_per_shard": 100}
    return {name: value for name, value in {**job, **changes}.items() if value is not None}


def test_a_predict_job_is_planned_from_the_hub_and_its_input(read, tmp_path, hub_folder):
    job = read(predict_job(hub_folder))
    plan = plan_predictions(job, ObjectStore(tmp_path / "run"))
    assert plan.hub.experts == ("left", "right")
    shards = plan.shards
    assert (shards.num_samples, shards.num_shards, shards.stage) == (537, 6, "predictions")
    [row] = plan_job(job).tasks
    assert (row.tasks, row.work) == (6, "537 samples, 2 experts, k = 1")
    assert not (tmp_path / "run").exists()


def test_a_hub_is_found_by_its_relative_path_from_where_one_stands(read, tmp_path, hub_folder):
    """As for shards and data, and not below the run that is to hold the predictions."""
    job = read(predict_job("other_run/models/hub-seed0"))
    plan = plan_predictions(job, ObjectStore(tmp_path / "run"))
    assert plan.hub.experts == ("left", "right")


def test_an_expert_is_found_by_its_relative_path_from_where_one_stands(read, tmp_path):
    stored(tmp_path)
    job = read(hub_job(hub=[trained("a"), {"name": "b", "model": "stored"}]))
    assert plan_job(job).tasks


def test_other_samples_or_another_hub_are_other_predictions(read, tmp_path, hub_folder):
    store = ObjectStore(tmp_path / "run")
    jobs = [
        predict_job(hub_folder),
        predict_job(hub_folder, data={**DIGITS, "limit": 537}),
        predict_job(hub_folder, data={**DIGITS, "domain": {"invert": True}}),
        predict_job(hub_folder, samples_per_shard=50),
    ]
    prints = [plan_predictions(read(job), store).shards.fingerprint for job in jobs]
    assert len(set(prints)) == len(prints)
    same = predict_job(hub_folder, experts={"max": 2, "batch_size": 7}, session={"num_cpus": 9})
    assert plan_predictions(read(same), store).shards.fingerprint == prints[0]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data": None}, "exactly one of data and shards"),
        ({"shards": {"run": "r", "stage": "s"}}, "exactly one of data and shards"),
        ({"data": None, "shards": {"run": "r", "stage": "s"}}, "r has no stage 's' of shards"),
        ({"model": "/no/hub"}, r"no model at /no/hub: hub\.json not found there"),
        ({"data": {**DIGITS, "size": 12}}, r"takes .*\(1, 8, 8\), the input has \(1, 12, 12\)"),
        ({"data": {**DIGITS, "channels": 3}}, r"the input has \(3, 8, 8\); set its size"),
        (
            {"experts": {"resources": {"middle": {"gpu_node": 1}}}},
            r"experts\.resources: the hub has no expert middle; it has left, right",
        ),
        ({"session": {"num_cpus": 2}}, r"session\.num_cpus: 2 experts and 1 routers need 3, got 2"),
        ({"experts": {"min": 5}}, "experts: expected min <= max"),
        ({"experts": {"min": 4, "max": 4}}, r"session\.num_cpus: .*need 9, got 8"),
        ({"experts": {"routers": 0}}, r"experts\.routers"),
    ],
)
def test_a_predict_job_that_cannot_work_says_why_before_anything_starts(
    read, tmp_path, hub_folder, changes, told
):
    assert_refused(predict_job(**{"model": hub_folder, **changes}), told, read, tmp_path)
