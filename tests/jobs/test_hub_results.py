"""The results, exports and gallery of a hub run, from an outcome with made-up predictions."""

import json

import numpy as np
import pytest
from safetensors.numpy import load as load_arrays

from dist_tl.jobs.hub.exports import export
from dist_tl.jobs.hub.plan import HubPlan
from dist_tl.jobs.hub.results import results
from dist_tl.jobs.hub.run import HubOutcome
from dist_tl.jobs.hub.spec import HubJob
from dist_tl.jobs.hub.tasks import EvaluateOutput, TimeOutput
from dist_tl.report.results import RunRecord, results_of, stored_results, write_results
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.rows import load_rows
from dist_tl.train.spec import StageResult

DIGITS = {"source": "digits", "classes": [0, 1]}
ARMS = [
    "best_single",
    "ensemble",
    "distilled",
    {"name": "all", "routes": {"k": 2}},
    {"name": "static_k1", "routes": {"k": 1, "by": "static"}},
    {"name": "random_k1", "routes": {"k": 1, "by": "random"}},
    {"name": "hub_k1", "routes": {"k": 1}},
]
# Wrong answers of 100, for each of three seeds.
WRONG = {
    "single-turned": (30, 31, 32),
    "single-plain": (20, 22, 21),
    "ensemble": (15, 16, 17),
    "distilled": (18, 19, 20),
    "all": (12, 14, 13),
    "static_k1": (22, 21, 23),
    "random_k1": (40, 44, 42),
    "hub_k1": (5, 5, 6),
}
WORTH = "Choosing by input (hub_k1)"


def hub_job(arms=ARMS, *, mixed=True):
    network = {"kind": "perceptron", "hidden": 3}
    halves = {
        "plain": {**DIGITS, "part": {"index": 0, "of": 2}},
        "turned": {**DIGITS, "part": {"index": 1, "of": 2}, "domain": {"rotate": 90}},
    }
    train = {"data": DIGITS, "network": network, "training": {"steps": 1, "batch_size": 8}}
    return HubJob.model_validate(
        {
            "kind": "hub",
            "run": "run",
            "seeds": 3,
            "hub": [{"name": name, "train": train} for name in ("turned", "plain")],
            "target": {
                "data": {"source": "mixture", "domains": halves} if mixed else DIGITS,
                "labels_per_class": 8,
                "training": {"steps": 1, "batch_size": 8},
            },
            "router": network,
            "arms": arms,
        }
    )


def stage(name, correct=(), *, seconds=1.0):
    return StageResult(
        name=name,
        fingerprint="f",
        world_size=1,
        started=100.0,
        first_step_at=101.0,
        ended=110.0,
        seconds=seconds,
        steps=10,
        samples=80,
        seconds_starved=0.0,
        seconds_saving=0.0,
        final_loss=0.5,
        predictions=tuple(int(c) for c in correct),
        correct=correct,
    )


def outcome(tmp_path, *, arms=ARMS, mixed=True, wrong=WRONG):
    """Every arm is wrong on the first rows; the input chooses the domain's expert."""
    plan = HubPlan(hub_job(arms, mixed=mixed), ObjectStore(tmp_path / "run"))
    rows = load_rows(plan.rows(0, "test"))
    right = {
        (name, seed): tuple(i >= count for i in range(len(rows)))
        for name, counts in wrong.items()
        for seed, count in enumerate(counts)
    }
    stages, evaluations = {}, {}
    for seed in range(3):
        for expert in plan.job.hub:
            for use in ("single", "pick"):
                name = f"{use}-{expert.name}"
                stages[f"{name}-seed{seed}"] = stage(
                    f"{name}-seed{seed}", right[f"single-{expert.name}", seed]
                )
        for arm in plan.job.arms:
            if arm.route == "best_single":
                continue
            correct = right[arm.name, seed]
            if arm.route != "ensemble":
                stages[f"{arm.name}-seed{seed}"] = stage(f"{arm.name}-seed{seed}", correct)
            domains = rows.domains if mixed else rows.labels
            routes = [(0.0, 0.9) if domain == 0 else (0.9, 0.0) for domain in domains]
            evaluations[arm.name, seed] = EvaluateOutput(
                predictions=tuple(rows.labels.tolist()),
                correct=correct,
                weights=tuple(routes) if arm.route == "pathway" else (),
                multiply_adds=1e6 * (seed + 1),
                seconds=1.0,
            )
    names = [arm.name for arm in plan.job.arms]
    times = TimeOutput(
        microseconds=dict.fromkeys(names, 7.0),
        multiply_adds={"best_single": 3e6, "distilled": 4e6},
        seconds=1.0,
    )
    return HubOutcome(plan, stages, ("plain", "plain", "turned"), evaluations, times)


def findings(found):
    return results(found).findings


def test_a_finding_says_if_choosing_by_input_beat_the_controls(tmp_path):
    said = findings(outcome(tmp_path))
    assert f"{WORTH} beat static_k1 and random_k1 at k = 1." in said


@pytest.mark.parametrize(
    "hub_k1",
    [(30, 30, 30), (5, 40, 22), (21, 21, 22)],
    ids=["worse than one", "as often better as worse", "better than chance alone"],
)
def test_a_finding_says_if_it_did_not_clearly_beat_both(tmp_path, hub_k1):
    said = findings(outcome(tmp_path, wrong={**WRONG, "hub_k1": hub_k1}))
    assert f"{WORTH} did not clearly beat static_k1 and random_k1 at k = 1." in said


def test_one_arm_is_compared_with_every_arm_that_does_not_choose_by_input(tmp_path):
    said = [line for line in findings(outcome(tmp_path)) if " against " in line]
    others = ("best_single", "ensemble", "distilled", "static_k1", "random_k1")
    assert [line.partition(":")[0] for line in said] == [f"hub_k1 against {o}" for o in others]
    total = len(load_rows(outcome(tmp_path).plan.rows(0, "test")))
    points = 100 * np.mean(np.subtract((40, 44, 42), (5, 5, 6))) / total
    assert f"hub_k1 against random_k1: +{points:.1f} points" in said[-1]
    assert said[-1].endswith("better beyond noise.")


def test_controls_at_another_k_decide_nothing(tmp_path):
    arms = [*ARMS[:3], {"name": "hub_k1", "routes": {"k": 1}}]
    control = {"name": "static_k1", "routes": {"k": 2, "by": "static"}}
    for some in (arms, [*arms, control]):
        said = findings(outcome(tmp_path, arms=some))
        assert not [line for line in said if "beat" in line]
        assert [line for line in said if line.startswith(WORTH)] == [
            f"{WORTH} was not compared with static or random routes at k = 1."
        ]


def test_a_hub_of_all_experts_makes_no_claim_about_choosing(tmp_path):
    said = findings(outcome(tmp_path, arms=ARMS[:4]))
    assert not [line for line in said if line.startswith("Choosing")]


def test_the_best_single_is_the_one_that_validation_picked_for_each_seed(tmp_path):
    found = results(outcome(tmp_path))
    scores = {(score.arm, score.seed): score for score in found.scores}
    total = scores["best_single", 0].total
    wrong = [total - scores["best_single", seed].correct for seed in range(3)]
    assert wrong == [20, 22, 32]  # the third seed picked the worse one
    [summary] = [summary for summary in found.summaries if summary.arm == "best_single"]
    assert summary.gain is None
    assert summary.note == "picked: plain 2x, turned 1x"
    assert [s.arm for s in found.summaries if s.reference] == ["single turned", "single plain"]


def test_seconds_include_all_stages_that_an_arm_needs(tmp_path):
    scores = {s.arm: s for s in results(outcome(tmp_path)).scores if s.seed == 0}
    # Two picks and the single; two singles; those and the student; the hub alone.
    seconds = {"best_single": 3, "ensemble": 2, "distilled": 3, "hub_k1": 1, "single plain": 1}
    assert {arm: scores[arm].seconds for arm in seconds} == seconds
    assert scores["distilled"].samples == 3 * 80


def test_the_warm_start_is_part_of_the_cost(tmp_path):
    found = outcome(tmp_path)
    found.stages["warm-hub_k1-seed0"] = stage("warm-hub_k1-seed0", seconds=5.0)
    scores = {(s.arm, s.seed): s for s in results(found).scores}
    assert scores["hub_k1", 0].seconds == 6.0
    assert scores["hub_k1", 0].samples == 160
    assert scores["hub_k1", 1].seconds == 1.0


def test_the_maps_show_which_expert_sees_which_domain_and_class(tmp_path):
    found = results(outcome(tmp_path))
    domain, kind = found.heat_maps
    assert domain.title == "hub_k1: which experts see which domain"
    assert (domain.x, domain.y) == (("turned", "plain"), ("plain", "turned"))
    assert domain.values == ((0.0, 100.0), (100.0, 0.0))
    assert kind.y == ("0", "1")
    for row in kind.values:
        assert sum(row) == pytest.approx(100.0)
    [table] = [t for t in found.tables if t.title.startswith("Which expert")]
    assert [row[2] for row in table.rows] == ["plain (100%)", "turned (100%)"]


def test_without_domains_there_is_one_map_of_classes_and_no_table_of_domains(tmp_path):
    found = results(outcome(tmp_path, mixed=False))
    assert [heat_map.y_label for heat_map in found.heat_maps] == ["class"]
    assert [table.title for table in found.tables] == ["Cost of a prediction"]


def test_the_cost_of_a_prediction_is_counted_for_every_arm(tmp_path):
    found = results(outcome(tmp_path))
    costs = {row[0]: row[1:] for row in found.tables[0].rows}
    assert costs["best_single"] == ("3.000", "7")
    assert costs["distilled"] == ("4.000", "7")
    assert costs["ensemble"] == costs["hub_k1"] == ("2.000", "7")  # mean over three seeds
    [chart] = found.charts
    assert [series.label for series in chart.series] == [row[0] for row in found.tables[0].rows]


def test_the_results_come_back_from_their_file(tmp_path):
    record = RunRecord(
        run="demo",
        kind="hub",
        fingerprint="f",
        stages=(),
        versions={},
        wall_seconds=60.0,
        peak_memory_bytes=1 << 30,
    )
    found = results_of(record, results(outcome(tmp_path)))
    store = ObjectStore(tmp_path / "stored")
    write_results(store, found)
    assert stored_results(store) == found


# Exports.


def test_every_arm_with_a_model_is_exported_with_a_card(tmp_path):
    found, store = outcome(tmp_path), ObjectStore(tmp_path / "run")
    for name in found.stages:
        store.write(f"{layout.stage_model_prefix(name)}/inner/config.json", name.encode())
    export(found, store)
    names = {key.split("/")[1] for key in store.list("models")}
    arms = ("best_single", "distilled", "all", "static_k1", "random_k1", "hub_k1")
    assert names == {f"{arm}-seed{seed}" for arm in arms for seed in range(3)}
    assert store.read("models/best_single-seed2/inner/config.json") == b"single-turned-seed2"
    card = store.read("models/hub_k1-seed0/README.md").decode()
    assert "a hub of 2 experts" in card
    assert "load_hub" in card
    assert "load_network" in store.read("models/best_single-seed0/README.md").decode()


@pytest.mark.parametrize("mixed", [True, False])
def test_the_gallery_shows_images_of_every_domain_with_their_routes(tmp_path, mixed):
    found, store = outcome(tmp_path, mixed=mixed), ObjectStore(tmp_path / "run")
    export(found, store)
    data = store.read(layout.GALLERY)
    arrays = load_arrays(data)
    assert arrays["pseudo_images"].shape == (10, 8, 8, 1)
    assert (arrays["conditions"] > 0).sum(axis=1).tolist() == [1] * 10
    size = int.from_bytes(data[:8], "little")
    told = json.loads(data[8 : 8 + size])["__metadata__"]
    captions = json.loads(told["captions"])
    assert json.loads(told["source_classes"]) == ["turned", "plain"]
    assert captions[0].endswith("plain: right" if mixed else "0: right")


def test_a_run_without_routes_by_input_has_no_gallery(tmp_path):
    found, store = outcome(tmp_path, arms=[*ARMS[:3], ARMS[4]]), ObjectStore(tmp_path / "run")
    export(found, store)
    assert not store.exists(layout.GALLERY)
