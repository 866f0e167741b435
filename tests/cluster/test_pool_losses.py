"""What pools decide when workers are lost, against a ray that does as it is told."""

from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    OutOfMemoryError,
)

from dist_tl.cluster import experts, generators, outcomes, pending, router_pool, routers
from dist_tl.cluster.config import ExpertsConfig, GeneratorsConfig
from dist_tl.cluster.experts import ExpertPool
from dist_tl.cluster.generators import GeneratorPool
from dist_tl.cluster.pending import PendingActors
from dist_tl.cluster.routers import Question, ShardAnswer
from dist_tl.errors import ConfigError, WorkerError, WorkerLostError

GONE = ActorUnavailableError("its node does not answer", None)
DEAD, FULL = ActorDiedError(), OutOfMemoryError("the node is low on memory")


class Ticket:
    def __init__(self, outcome):
        self.outcome = outcome


class Method:
    """Answers with what is listed, one after the other, the last for ever."""

    def __init__(self, *outcomes):
        self.outcomes, self.inputs = list(outcomes), 0

    def remote(self, *_):
        self.inputs += 1
        return Ticket(self.outcomes.pop(0) if len(self.outcomes) > 1 else self.outcomes[0])


class Actor:
    def __init__(self, answer=None, *, opens=(None,)):
        self.open, self.is_killed = Method(*opens), False
        self.answer = self.logits = Method(*(answer if isinstance(answer, tuple) else (answer,)))


@pytest.fixture(autouse=True)
def obedient(monkeypatch):
    def get(ticket, timeout=None):
        if isinstance(ticket.outcome, BaseException):
            raise ticket.outcome
        return ticket.outcome

    def kill(actor):
        actor.is_killed = True

    stand_in = SimpleNamespace(
        wait=lambda tickets, num_returns=1, timeout=None: (list(tickets), []),
        get=get,
        kill=kill,
        exceptions=ray.exceptions,
    )
    for module in (pending, experts, generators, outcomes, router_pool, routers):
        monkeypatch.setattr(module, "ray", stand_in)
    quiet = SimpleNamespace(count=lambda: None)
    monkeypatch.setattr(router_pool, "RestartMetrics", lambda *_: quiet)
    monkeypatch.setattr(generators, "RestartMetrics", lambda *_: quiet)
    monkeypatch.setattr(generators, "GeneratorMetrics", lambda *_: None)
    monkeypatch.setattr(routers, "ASK_AGAIN_S", 0.0)
    monkeypatch.setattr(router_pool, "PAUSE_S", 0.001)
    monkeypatch.setattr(experts, "POLL_S", 0.001)
    monkeypatch.setattr(experts, "committed_indices", lambda store, stage: set())


def test_who_is_out_of_sight_may_come_back_and_who_is_dead_does_not():
    waiting = PendingActors()
    back, dead, full = Actor(opens=(GONE, None)), Actor(opens=(DEAD,)), Actor(opens=(FULL,))
    for key, actor in (("back", back), ("dead", dead), ("full", full)):
        waiting.add(key, actor)
    assert waiting.poll() == [("dead", dead, DEAD), ("full", full, FULL)]
    assert waiting.poll() == [("back", back, None)]
    assert len(waiting) == 0


def test_the_error_of_ours_that_kept_an_actor_from_opening_is_raised_as_it_is():
    waiting = PendingActors()
    wrapped = ray.exceptions.RayTaskError("open", "traceback", ConfigError("damaged"))
    waiting.add("it", Actor(opens=(wrapped,)))
    with pytest.raises(ConfigError, match="damaged"):
        waiting.poll()


def answer(monkeypatch, new_routers, *, shards=1, new_experts=None, **config):
    """Answers `shards` shards with one expert and the routers given, one after the other."""
    made = iter(new_routers)
    monkeypatch.setattr(ExpertPool, "_new_router", lambda self: next(made))
    made_experts = iter(new_experts or [Actor() for _ in range(9)])
    monkeypatch.setattr(ExpertPool, "_new_expert", lambda self, name: next(made_experts))
    store = SimpleNamespace(url="memory://run")
    plan = SimpleNamespace(num_shards=shards, stage="predictions")
    with ExpertPool(ExpertsConfig(**config), store, "hub", ["one"], degrade=False) as found:
        found.answer(None, plan)
    return found


ANSWER = ShardAnswer(0, (1,), {}, None)


def test_a_router_whose_replacement_dies_on_its_way_is_replaced_again(monkeypatch):
    third = Actor(ANSWER)
    answer(monkeypatch, [Actor(GONE), Actor(opens=(DEAD,)), third])
    assert third.answer.inputs == 1


def test_routers_that_never_come_up_end_the_job_by_name(monkeypatch):
    with pytest.raises(WorkerError, match="no router: "):
        answer(monkeypatch, [Actor(opens=(DEAD,)) for _ in range(9)])


def test_idle_routers_of_a_lost_node_cost_a_shard_nothing(monkeypatch):
    """Six routers on one node, one shard left: the five that sit idle are asked for a sign."""
    lost = [Actor(GONE, opens=(None, DEAD)) for _ in range(6)]
    healthy = Actor(ANSWER)
    answer(
        monkeypatch, [*lost, healthy, *(Actor(ANSWER) for _ in range(9))], routers=6, max_restarts=1
    )
    assert sum(router.answer.inputs for router in lost) == 1


def test_a_shard_that_costs_every_router_its_life_ends_the_job(monkeypatch):
    with pytest.raises(WorkerLostError, match="router of shard 0"):
        answer(monkeypatch, [Actor(FULL) for _ in range(9)], max_restarts=2)


def test_an_expert_that_has_no_memory_to_load_is_named(monkeypatch):
    with pytest.raises(WorkerError, match=r"expert one stayed away \(.*low on memory"):
        answer(monkeypatch, [Actor(ANSWER)], new_experts=[Actor(opens=(FULL,)) for _ in range(9)])


def question(*answers):
    replicas = [Actor(answer) for answer in answers]
    return Question(SimpleNamespace(expert=0), None, replicas, 0), replicas


def test_an_answer_comes_from_another_replica_where_one_is_dead():
    inputs, replicas = question(DEAD, FULL, "logits")
    assert inputs.answer(deadline=0.0) == "logits"
    assert [replica.logits.inputs for replica in replicas] == [1, 1, 1]


def test_where_all_replicas_are_dead_nobody_waits():
    inputs, replicas = question(DEAD, FULL)
    with pytest.raises(OutOfMemoryError):
        inputs.answer(deadline=float("inf"))
    assert [replica.logits.inputs for replica in replicas] == [1, 1]


def test_a_replica_out_of_sight_is_asked_again_until_the_deadline():
    inputs, [replica] = question((GONE, GONE, "logits"))
    assert inputs.answer(deadline=float("inf")) == "logits"
    inputs, [replica] = question(GONE)
    with pytest.raises(ActorUnavailableError):
        inputs.answer(deadline=0.0)
    assert replica.logits.inputs == 1


@pytest.fixture
def generator_pool(tmp_path):
    config = GeneratorsConfig(min=1, max=4, max_restarts=2)
    return GeneratorPool(config, str(tmp_path), positions=dict)


@pytest.mark.parametrize("error", [GONE, DEAD, FULL])
def test_a_shard_whose_worker_is_lost_goes_back_in_its_place(generator_pool, error):
    stage = SimpleNamespace(spec=SimpleNamespace(name="pp"), todo=[3, 7])
    lost, idle = Actor(), Actor()
    generator_pool._idle.append((idle, 0.0))
    for _ in range(2):
        generator_pool._running[Ticket(error)] = (lost, stage, 5)
        generator_pool._collect()
        assert stage.todo == [3, 5, 7]
        stage.todo.remove(5)
    assert lost.is_killed
    assert not generator_pool._idle, "may have gone with the same node"
    generator_pool._welcome()
    assert [actor for actor, _ in generator_pool._idle] == [idle]
    generator_pool._running[Ticket(error)] = (lost, stage, 5)
    with pytest.raises(type(error)):
        generator_pool._collect()


def test_workers_that_die_on_their_way_are_waited_for_longer_each_time(generator_pool):
    generator_pool._idle.append((Actor(), 0.0))  # with others at work it never ends the job
    pauses = []
    for _ in range(1100):
        generator_pool._arrivals.add(generators.NEW, Actor(opens=(FULL,)))
        before = generators.time.monotonic()
        generator_pool._welcome()
        pauses.append(round(generator_pool._start_after - before))
    assert pauses[:4] == [2, 4, 8, 16]
    assert pauses[-1] == generators.MAX_PAUSE_S
