"""A hub distributed over actors predicts like the local module, even if actors die."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from small_stages import workers_named
from stored_hubs import LOCATION, NAMES, ROWS, SOURCE, predictions, small_hub, store_hub

from dist_tl.cluster.config import ExpertsConfig
from dist_tl.cluster.experts import ExpertPool
from dist_tl.errors import ConfigError, SupersededError, WorkerError, WorkerLostError
from dist_tl.methods.hub.pathway import Paths
from dist_tl.methods.hub.routes import choose
from dist_tl.shards.reader import read_shard
from dist_tl.storage.attempts import begin_attempt
from dist_tl.train.rows import load_rows

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


def pool(store, *, degrade=False, attempt=0, **config):
    config = ExpertsConfig(**{"cpus": 0.5, "router_cpus": 0.5, "timeout_s": 60, **config})
    return ExpertPool(config, store, LOCATION, NAMES, degrade=degrade, attempt=attempt)


def predicted(store, plan):
    """Returns all committed predictions in order; asserts that each sample occurs once."""
    samples = [s for i in range(plan.num_shards) for s in read_shard(store, plan.stage, i)]
    assert [sample.number for sample in samples] == list(range(ROWS))
    return samples


@torch.no_grad()
def local(hub):
    return Paths(*hub(load_rows(SOURCE.rows).tensor(), detailed=True))


def logits_of(samples):
    return torch.stack([torch.tensor(sample.image).flatten() for sample in samples])


@pytest.fixture
def stored(store):
    hub = small_hub()
    store_hub(store, hub)
    return store, hub, predictions(store)


@pytest.mark.parametrize(
    "config", [{}, {"batch_size": 3, "routers": 2, "min": 2, "max": 2}], ids=["plain", "spread"]
)
def test_predictions_equal_the_local_module_for_any_batch_size_and_replicas(stored, config):
    store, hub, plan = stored
    with pool(store, **config) as experts:
        experts.answer(SOURCE, plan)
        assert not experts.lost
    samples, expected = predicted(store, plan), local(hub)
    assert torch.allclose(logits_of(samples), expected.logits_BC, atol=1e-5)
    assert [sample.label for sample in samples] == expected.logits_BC.argmax(dim=1).tolist()
    for sample, active in zip(samples, expected.active_BM.tolist(), strict=True):
        wanted = {name for name, is_active in zip(NAMES, active, strict=True) if is_active}
        assert set(sample.provenance["weights"]) == wanted
        assert not sample.provenance["rerouted"]
    labels = load_rows(SOURCE.rows).labels.tolist()
    assert [sample.provenance["truth"] for sample in samples] == labels


def test_committed_shards_are_not_predicted_again(stored):
    store, _, plan = stored
    with pool(store) as experts:
        experts.answer(SOURCE, plan)
        before = {key: store.read(key) for key in store.list("stages")}
        calls = []
        experts.answer(SOURCE, plan, on_done=lambda done, total: calls.append(done))
    assert calls == []
    assert {key: store.read(key) for key in store.list("stages")} == before


def process_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def test_a_killed_expert_is_restarted_and_no_sample_is_lost_or_duplicated(stored):
    store, hub, plan = stored
    with pool(store) as experts:
        experts.wait_until_up()
        victim = experts.replicas[1].actors[0]
        first = process_of(victim)
        killed = []

        def kill_in_the_middle(done, total):
            if done == 2 and not killed:
                killed.append(os.kill(first, signal.SIGKILL))

        experts.answer(SOURCE, plan, on_done=kill_in_the_middle)
        assert killed
        assert process_of(victim) != first
    samples = predicted(store, plan)
    assert torch.allclose(logits_of(samples), local(hub).logits_BC, atol=1e-5)


def test_a_lost_expert_is_a_named_error_and_committed_shards_are_kept(stored):
    store, hub, plan = stored
    with pool(store, max_restarts=0) as experts:
        lose = _lose(experts, at=2)
        with pytest.raises(WorkerError, match=r"second is unavailable.*degrade: true"):
            experts.answer(SOURCE, plan, on_done=lose)
    done = len(store.list("stages/predictions/entries"))
    assert 2 <= done < plan.num_shards
    with pool(store) as experts:  # another attempt resumes
        experts.answer(SOURCE, plan)
    assert torch.allclose(logits_of(predicted(store, plan)), local(hub).logits_BC, atol=1e-5)


def _lose(experts, *, at):
    def kill(done, total):
        if done == at:
            ray.kill(experts.replicas[1].actors[0], no_restart=True)

    return kill


def test_with_degrade_a_lost_expert_is_left_out_and_rerouted_samples_are_marked(stored):
    store, hub, plan = stored
    with pool(store, degrade=True, max_restarts=0) as experts:
        experts.answer(SOURCE, plan, on_done=_lose(experts, at=2))
        assert experts.lost == {1}
    samples, expected = predicted(store, plan), local(hub)
    marked = torch.tensor([sample.provenance["rerouted"] for sample in samples])
    wanted = expected.active_BM[:, 1]
    assert not marked[:32].any()  # predicted before the loss
    assert torch.equal(marked[48:], wanted[48:])
    assert marked.any()
    kept = ~marked
    assert torch.allclose(logits_of(samples)[kept], expected.logits_BC[kept], atol=1e-5)
    with torch.no_grad():
        images = load_rows(SOURCE.rows).tensor()
        routes = choose(hub.route_logits(images), hub.routes, missing=frozenset({1}))
    for row in marked.nonzero().flatten().tolist():
        weights = samples[row].provenance["weights"]
        assert "second" not in weights
        names = {n: float(w) for n, w in zip(NAMES, routes.weight_BM[row], strict=True) if w}
        assert weights == pytest.approx(names, abs=1e-5)


def test_too_few_experts_left_are_a_named_error_even_with_degrade(stored):
    store, _, plan = stored
    with pool(store, degrade=True, max_restarts=0) as experts:
        experts.wait_until_up()
        for index in (0, 2):
            ray.kill(experts.replicas[index].actors[0], no_restart=True)
        with pytest.raises(WorkerError, match="1 experts are available, every sample needs 2"):
            experts.answer(SOURCE, plan)


def wait_for_pending(experts):
    """Waits for pending replicas, which take longer to start than a small shard."""
    for actor in experts.pending.actors:
        ray.get(actor.open.remote(), timeout=60)


def test_the_number_of_replicas_follows_the_load(store):
    hub = small_hub(k=1)
    with torch.no_grad():
        hub.router.head.weight.zero_()
        hub.router.head.bias.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0, 0.0, 0.0]))
    store_hub(store, hub)
    plan = predictions(store)
    with pool(store, max=3) as experts:
        experts.answer(SOURCE, plan, on_done=lambda done, total: wait_for_pending(experts))
        assert [replicas.most for replicas in experts.replicas] == [1, 1, 3]
        assert [replicas.pairs for replicas in experts.replicas] == [0, 0, ROWS]


def test_the_pool_does_not_wait_for_replicas_that_cannot_be_scheduled(stored):
    """The cluster has 8 CPUs: of 2 routers and 3 x 4 replicas of 1.5 each, some never start."""
    store, hub, plan = stored
    with pool(store, max=4, routers=2, cpus=1.5, timeout_s=30) as experts:
        experts.answer(SOURCE, plan)
        assert not experts.lost
        assert sum(replicas.most for replicas in experts.replicas) <= 4
    assert torch.allclose(logits_of(predicted(store, plan)), local(hub).logits_BC, atol=1e-5)


def test_an_expert_that_cannot_be_scheduled_is_named_before_any_prediction(stored):
    store, _, plan = stored
    nowhere = {"second": {"no_such_node": 1}}
    named = r"second is unavailable \(not ready after 8 s.*resources"
    with (
        pytest.raises(WorkerError, match=named),
        pool(store, resources=nowhere, timeout_s=8) as experts,
    ):
        experts.answer(SOURCE, plan)
    assert not store.list("stages/predictions/entries")


def test_a_router_that_cannot_be_scheduled_is_named(stored):
    store, _, plan = stored
    with (
        pytest.raises(WorkerError, match=r"no router: not ready after 8 s.*resources"),
        pool(store, router_cpus=100, timeout_s=8) as experts,
    ):
        experts.answer(SOURCE, plan)


def test_a_replica_that_does_not_start_lowers_the_limit_only(stored):
    store, hub, plan = stored
    with pool(store, min=2, max=2, cpus=0.25) as experts:
        ray.kill(experts.pending.actors[0], no_restart=True)
        experts.answer(SOURCE, plan)
        assert not experts.lost
        assert experts.replicas[0].limit == 1
    assert torch.allclose(logits_of(predicted(store, plan)), local(hub).logits_BC, atol=1e-5)


@pytest.mark.parametrize("part", ["experts/second", "router"])
def test_a_damaged_hub_is_a_named_error_and_not_an_unavailable_expert(stored, part):
    store, _, plan = stored
    store.write(f"{LOCATION}/{part}/config.json", b"{}")
    with (
        pytest.raises(ConfigError, match=r"config\.json"),
        pool(store, degrade=True) as experts,
    ):
        experts.answer(SOURCE, plan)


def test_a_killed_router_is_replaced_and_its_shard_predicted(stored):
    store, hub, plan = stored

    def kill_a_router(done, total):
        if done == 2:
            workers_named("RouterActor")[0].kill()

    with pool(store) as experts:
        experts.answer(SOURCE, plan, on_done=kill_a_router)
    assert torch.allclose(logits_of(predicted(store, plan)), local(hub).logits_BC, atol=1e-5)


def test_a_shard_that_kills_routers_too_often_ends_the_job_with_a_remedy(stored):
    store, _, plan = stored
    with (
        pytest.raises(WorkerLostError, match="start the same job again"),
        pool(store, max_restarts=0) as experts,
    ):
        experts.answer(
            SOURCE, plan, on_done=lambda done, total: workers_named("RouterActor")[0].kill()
        )


def test_a_superseded_attempt_commits_nothing(stored):
    store, _, plan = stored
    first, _ = begin_attempt(store), begin_attempt(store)
    with (
        pytest.raises(SupersededError, match="attempt 2"),
        pool(store, attempt=first.number) as experts,
    ):
        experts.answer(SOURCE, plan)
    assert not store.list("stages/predictions/entries")


def test_retired_replicas_get_no_requests_while_the_load_changes(stored):
    store, hub, plan = stored
    with pool(store, max=3, routers=2, cpus=0.25, batch_size=2, timeout_s=30) as experts:

        def change_load(done, total):
            wait_for_pending(experts)
            for index, replicas in enumerate(experts.replicas):
                replicas.load = 1.0 if index == done % len(NAMES) else 0.1

        experts.answer(SOURCE, plan, on_done=change_load)
        assert not experts.lost
        assert max(replicas.most for replicas in experts.replicas) > 1
    assert torch.allclose(logits_of(predicted(store, plan)), local(hub).logits_BC, atol=1e-5)


# Where Ray listens on loopback it refuses a second node; where not, it replaces 127.0.0.1.
RAY_ON_LOOPBACK = """
from ray._private import ray_constants, services
from ray.scripts.scripts import main
ray_constants.ENABLE_RAY_CLUSTER = True
services.resolve_ip_for_localhost = lambda host: host
main()
"""


@pytest.fixture
def second_node(ray_local):
    """A second Ray node with its own processes and resources, like another machine."""
    node = subprocess.Popen(
        [
            sys.executable,
            "-c",
            RAY_ON_LOOPBACK,
            "start",
            "--node-ip-address=127.0.0.1",
            "--address",
            os.environ["RAY_ADDRESS"],
            "--block",
            "--num-cpus=4",
            '--resources={"second_node": 4}',
            "--object-store-memory=100000000",
            "--disable-usage-stats",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while "second_node" not in ray.cluster_resources():
        assert node.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    yield node
    with suppress(ProcessLookupError):
        os.killpg(node.pid, signal.SIGKILL)
    node.wait()


class Guest:
    """An actor that only takes room."""


def test_experts_of_a_lost_node_restart_on_another(stored, second_node):
    """Experts run on both nodes; the cluster notices the loss of one only after a while."""
    store, hub, plan = stored
    driver_node = ray.get_runtime_context().get_node_id()
    # Leaves no room for all experts on this node, until they run.
    here = NodeAffinitySchedulingStrategy(driver_node, soft=False)
    guest = ray.remote(Guest).options(num_cpus=3, scheduling_strategy=here).remote()
    ray.get(guest.__ray_ready__.remote())
    with pool(store, cpus=2, routers=2) as experts:
        experts.wait_until_up()
        ray.kill(guest)
        nodes = {
            ray.get(actor.__ray_call__.remote(_node_of))
            for replicas in experts.replicas
            for actor in replicas.actors
        }
        assert len(nodes) == 2
        assert driver_node in nodes

        def lose_the_node(done, total):
            if done == 1:
                os.killpg(second_node.pid, signal.SIGKILL)

        experts.answer(SOURCE, plan, on_done=lose_the_node)
        assert not experts.lost
    assert torch.allclose(logits_of(predicted(store, plan)), local(hub).logits_BC, atol=1e-5)


@pytest.mark.usefixtures("second_node")
def test_a_killed_expert_on_a_second_node_does_not_change_predictions(stored):
    store, hub, plan = stored
    resources = {"second": {"second_node": 1}, "third": {"second_node": 1}}
    with pool(store, resources=resources) as experts:
        experts.wait_until_up()
        nodes = [
            ray.get(replicas.actors[0].__ray_call__.remote(_node_of))
            for replicas in experts.replicas
        ]
        assert nodes[1] == nodes[2]
        far = process_of(experts.replicas[2].actors[0])
        experts.answer(
            SOURCE,
            plan,
            on_done=lambda done, total: os.kill(far, signal.SIGKILL) if done == 1 else None,
        )
        assert process_of(experts.replicas[2].actors[0]) != far
        assert not experts.lost
    assert nodes[1] != ray.get_runtime_context().get_node_id()
    assert torch.allclose(logits_of(predicted(store, plan)), local(hub).logits_BC, atol=1e-5)


def _node_of(actor):
    return ray.get_runtime_context().get_node_id()
