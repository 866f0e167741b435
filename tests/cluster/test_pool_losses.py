"""Decisions of pools when workers are lost, with a scripted stand-in for ray."""

from types import SimpleNamespace

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
    RayTaskError,
)

from dist_tl.cluster import experts, generators, outcomes, pending, router_pool, routers
from dist_tl.cluster.config import ExpertsConfig, GeneratorsConfig
from dist_tl.cluster.experts import ExpertPool
from dist_tl.cluster.generators import GeneratorPool
from dist_tl.cluster.pending import PendingActors
from dist_tl.cluster.routers import ExpertRequest, ShardResult
from dist_tl.errors import ConfigError, WorkerError, WorkerLostError

UNAVAILABLE = ActorUnavailableError("its node does not respond", None)
DEAD, OUT_OF_MEMORY = ActorDiedError(), OutOfMemoryError("the node is low on memory")


class Ref:
    def __init__(self, outcome):
        self.outcome = outcome


class Method:
    """Returns the listed outcomes in turn, then the last one repeatedly."""

    def __init__(self, *outcomes):
        self.outcomes, self.calls = list(outcomes), 0

    def remote(self, *_):
        self.calls += 1
        return Ref(self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0])


class Actor:
    def __init__(self, result=None, *, opens=(None,)):
        self.open, self.is_killed = Method(*opens), False
        self.predict = self.logits = Method(*(result if isinstance(result, tuple) else (result,)))


@pytest.fixture(autouse=True)
def scripted_ray(monkeypatch):
    def get(ref, timeout=None):
        if isinstance(ref.outcome, BaseException):
            raise ref.outcome
        return ref.outcome

    def kill(actor):
        actor.is_killed = True

    stand_in = SimpleNamespace(
        wait=lambda refs, num_returns=1, timeout=None: (list(refs), []),
        get=get,
        kill=kill,
    )
    for module in (pending, experts, generators, outcomes, router_pool, routers):
        monkeypatch.setattr(module, "ray", stand_in)
    no_metrics = SimpleNamespace(count=lambda: None)
    monkeypatch.setattr(router_pool, "RestartMetrics", lambda *_: no_metrics)
    monkeypatch.setattr(generators, "RestartMetrics", lambda *_: no_metrics)
    monkeypatch.setattr(generators, "GeneratorMetrics", lambda *_: None)
    monkeypatch.setattr(routers, "RETRY_S", 0.0)
    monkeypatch.setattr(router_pool, "PAUSE_S", 0.001)
    monkeypatch.setattr(experts, "POLL_S", 0.001)
    monkeypatch.setattr(experts, "committed_indices", lambda store, stage: set())


def test_an_unavailable_actor_stays_pending_and_a_dead_one_is_reported():
    pending_actors = PendingActors()
    unavailable, dead, full = (
        Actor(opens=(UNAVAILABLE, None)),
        Actor(opens=(DEAD,)),
        Actor(opens=(OUT_OF_MEMORY,)),
    )
    for key, actor in (("unavailable", unavailable), ("dead", dead), ("full", full)):
        pending_actors.add(key, actor)
    assert pending_actors.poll() == [("dead", dead, DEAD), ("full", full, OUT_OF_MEMORY)]
    assert pending_actors.poll() == [("unavailable", unavailable, None)]
    assert len(pending_actors) == 0


def test_a_named_error_of_open_is_raised_unwrapped():
    pending_actors = PendingActors()
    wrapped = RayTaskError("open", "traceback", ConfigError("damaged"))
    pending_actors.add("key", Actor(opens=(wrapped,)))
    with pytest.raises(ConfigError, match="damaged"):
        pending_actors.poll()


def predict(monkeypatch, new_routers, *, shards=1, new_experts=None, **config):
    """Predicts `shards` shards with one expert and the given routers, started in this order."""
    routers = iter(new_routers)
    monkeypatch.setattr(ExpertPool, "_new_router", lambda self: next(routers))
    experts = iter(new_experts or [Actor() for _ in range(9)])
    monkeypatch.setattr(ExpertPool, "_new_expert", lambda self, name: next(experts))
    store = SimpleNamespace(url="memory://run")
    plan = SimpleNamespace(num_shards=shards, stage="predictions")
    with ExpertPool(ExpertsConfig(**config), store, "hub", ["one"], degrade=False) as pool:
        pool.answer(None, plan)
    return pool


RESULT = ShardResult(0, (1,), {}, None)


def test_a_replacement_router_that_dies_during_start_up_is_replaced_again(monkeypatch):
    third = Actor(RESULT)
    predict(monkeypatch, [Actor(UNAVAILABLE), Actor(opens=(DEAD,)), third])
    assert third.predict.calls == 1


def test_routers_that_never_start_end_the_job_with_a_named_error(monkeypatch):
    with pytest.raises(WorkerError, match="no router: "):
        predict(monkeypatch, [Actor(opens=(DEAD,)) for _ in range(9)])


def test_idle_routers_of_a_lost_node_get_no_shard(monkeypatch):
    """Six routers on one lost node, one shard left: the five idle ones are probed first."""
    lost = [Actor(UNAVAILABLE, opens=(None, DEAD)) for _ in range(6)]
    healthy = Actor(RESULT)
    predict(
        monkeypatch, [*lost, healthy, *(Actor(RESULT) for _ in range(9))], routers=6, max_restarts=1
    )
    assert sum(router.predict.calls for router in lost) == 1


def test_a_shard_that_kills_every_router_ends_the_job(monkeypatch):
    with pytest.raises(WorkerLostError, match="router of shard 0"):
        predict(monkeypatch, [Actor(OUT_OF_MEMORY) for _ in range(9)], max_restarts=2)


def test_an_expert_that_runs_out_of_memory_while_loading_is_named(monkeypatch):
    with pytest.raises(WorkerError, match=r"expert one is unavailable \(.*low on memory"):
        predict(
            monkeypatch,
            [Actor(RESULT)],
            new_experts=[Actor(opens=(OUT_OF_MEMORY,)) for _ in range(9)],
        )


def expert_request(*results):
    replicas = [Actor(result) for result in results]
    return ExpertRequest(SimpleNamespace(expert=0), None, replicas, 0), replicas


def test_a_request_fails_over_to_another_replica_if_one_is_dead():
    request, replicas = expert_request(DEAD, OUT_OF_MEMORY, "logits")
    assert request.result(deadline=0.0) == "logits"
    assert [replica.logits.calls for replica in replicas] == [1, 1, 1]


def test_a_request_fails_at_once_if_all_replicas_are_dead():
    request, replicas = expert_request(DEAD, OUT_OF_MEMORY)
    with pytest.raises(OutOfMemoryError):
        request.result(deadline=float("inf"))
    assert [replica.logits.calls for replica in replicas] == [1, 1]


def test_a_request_to_an_unavailable_replica_is_repeated_until_the_deadline():
    request, [replica] = expert_request((UNAVAILABLE, UNAVAILABLE, "logits"))
    assert request.result(deadline=float("inf")) == "logits"
    request, [replica] = expert_request(UNAVAILABLE)
    with pytest.raises(ActorUnavailableError):
        request.result(deadline=0.0)
    assert replica.logits.calls == 1


@pytest.fixture
def generator_pool(tmp_path):
    config = GeneratorsConfig(min=1, max=4, max_restarts=2)
    return GeneratorPool(config, str(tmp_path), positions=dict)


@pytest.mark.parametrize("error", [UNAVAILABLE, DEAD, OUT_OF_MEMORY])
def test_the_shard_of_a_lost_worker_returns_to_its_position_in_the_queue(generator_pool, error):
    stage = SimpleNamespace(spec=SimpleNamespace(name="pp"), todo=[3, 7])
    lost, idle = Actor(), Actor()
    generator_pool._idle.append((idle, 0.0))
    for _ in range(2):
        generator_pool._running[Ref(error)] = (lost, stage, 5)
        generator_pool._collect()
        assert stage.todo == [3, 5, 7]
        stage.todo.remove(5)
    assert lost.is_killed
    assert not generator_pool._idle, "they may be lost with the same node"
    generator_pool._admit_ready()
    assert [actor for actor, _ in generator_pool._idle] == [idle]
    generator_pool._running[Ref(error)] = (lost, stage, 5)
    with pytest.raises(type(error)):
        generator_pool._collect()


def test_each_worker_that_dies_during_start_up_doubles_the_pause(generator_pool):
    generator_pool._idle.append(
        (Actor(), 0.0)
    )  # with another worker running, failed starts never end the job
    pauses = []
    for _ in range(1100):
        generator_pool._pending.add(generators.NEW, Actor(opens=(OUT_OF_MEMORY,)))
        before = generators.time.monotonic()
        generator_pool._admit_ready()
        pauses.append(round(generator_pool._start_after - before))
    assert pauses[:4] == [2, 4, 8, 16]
    assert pauses[-1] == generators.MAX_PAUSE_S
