"""Router actors: each answers one shard at a time with the help of the experts' actors."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ray
import torch
from ray.actor import ActorHandle

from dist_tl.cluster.inputs import RowsInput, Samples, StageInput, read_samples
from dist_tl.cluster.outcomes import named
from dist_tl.errors import WorkerError
from dist_tl.methods.hub.controls import chance_logits
from dist_tl.methods.hub.dispatch import SubBatch, place, sub_batches
from dist_tl.methods.hub.pathway import combine
from dist_tl.methods.hub.routes import Routes, choose, noisy_logits
from dist_tl.shards.manifest import ShardEntry, read_entry
from dist_tl.shards.order import ShardPlan
from dist_tl.shards.sample import PseudoSample
from dist_tl.shards.writer import write_shard
from dist_tl.storage.attempts import Attempt
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.hub_model import load_router

ASK_AGAIN_S = 0.5
FETCH_S = 5.0  # an answer may be there and still have to come from another node
_DEAD = (
    ray.exceptions.ActorDiedError,
    ray.exceptions.ActorUnschedulableError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.RuntimeEnvSetupError,
)


@dataclass(frozen=True)
class ShardAnswer:
    """What became of one shard.

    Attributes:
        pairs: (sample, expert) pairs by expert.
        lost: experts that stayed away, and what is known of why; nothing was committed unless they
            may be left out.
        entry: of the committed predictions; None where an expert is needed that was lost.
    """

    index: int
    pairs: tuple[int, ...]
    lost: dict[int, str]
    entry: ShardEntry | None


class RouterActor:
    """The router and the aggregator of a hub."""

    def __init__(self, store_url: str, place: str, threads: int, attempt: int) -> None:
        torch.set_num_threads(threads)
        self._store = ObjectStore(store_url)
        self._attempt = Attempt(self._store, attempt)
        self._place = place

    def open(self) -> None:
        """Load the hub.

        Raises:
            ConfigError: its files are missing or damaged.
        """
        self._hub = load_router(self._store, self._place)

    def answer(
        self,
        source: StageInput | RowsInput,
        plan: ShardPlan,
        index: int,
        experts: list[list[ActorHandle]],
        settings: "AnswerSettings",
    ) -> ShardAnswer:
        """Predictions of one shard, committed. A retry makes the same bytes if as many are missing.

        Args:
            plan: of the predictions.
            experts: the replicas of each expert, in the order of the hub.
        """
        done = read_entry(self._store, plan.stage, index)
        if done is not None:
            return ShardAnswer(index, (0,) * len(experts), {}, done)
        samples = read_samples(source, index)
        missing, reasons = settings.missing, dict[int, str]()
        while True:
            routes, wanted = self._routes(samples.images, missing)
            answers, lost = self._ask(samples, routes, experts, index, settings)
            if not lost:
                break
            missing, reasons = missing | lost.keys(), reasons | lost
            if not settings.degrade:
                return ShardAnswer(index, _pairs(routes), reasons, None)
        self._attempt.check()
        entry = write_shard(
            plan.order(index),
            self._predictions(samples, routes, wanted, answers, plan.order(index).numbers),
            self._store,
        )
        return ShardAnswer(index, _pairs(routes), reasons, entry)

    def _ask(
        self,
        samples: Samples,
        routes: Routes,
        experts: list[list[ActorHandle]],
        index: int,
        settings: "AnswerSettings",
    ) -> tuple[list[tuple[SubBatch, torch.Tensor]], dict[int, str]]:
        """Every expert's answers, and of those that gave none in time why."""
        deadline = time.monotonic() + settings.timeout_s
        questions = [
            # Turns spread over replicas; which of them answers changes nothing.
            Question(batch, samples.images[batch.rows_S], experts[batch.expert], turn)
            for turn, batch in enumerate(sub_batches(routes.active_BM, settings.batch_size), index)
        ]
        answers, lost = [], dict[int, str]()
        for question in questions:
            expert = question.batch.expert
            if expert in lost:
                continue
            try:
                answers.append((question.batch, question.answer(deadline)))
            except ray.exceptions.RayTaskError as error:
                raise named(error, f"expert {self._hub.about.experts[expert]}") from None
            except ray.exceptions.RayError as error:
                lost[expert] = str(error).strip().splitlines()[0]
        return answers, lost

    @torch.no_grad()
    def _routes(self, images: torch.Tensor, missing: frozenset[int]) -> tuple[Routes, Routes]:
        """The routes to be taken, and those that a whole hub would take."""
        config, count = self._hub.about.routes, len(self._hub.about.experts)
        if self._hub.router is None:
            z_BM = chance_logits(images, count)
        else:
            z_BM = noisy_logits(self._hub.router(images), None)
        try:
            return choose(z_BM, config, missing=missing), choose(z_BM, config)
        except ValueError as error:
            names = ", ".join(self._hub.about.experts[i] for i in sorted(missing))
            raise WorkerError(f"experts lost: {names}; {error}") from None

    @torch.no_grad()
    def _predictions(
        self,
        samples: Samples,
        routes: Routes,
        wanted: Routes,
        answers: list[tuple[SubBatch, torch.Tensor]],
        numbers: range,
    ) -> Iterator[PseudoSample]:
        about = self._hub.about
        placed_BMC = place(answers, len(samples.images), len(about.experts), about.num_classes)
        logits_BC = combine(self._hub.aggregator, placed_BMC, routes).float()
        rerouted = (routes.active_BM != wanted.active_BM).any(dim=1).tolist()
        weights = routes.weight_BM.tolist()
        for row, number in enumerate(numbers):
            provenance = {
                "weights": {
                    name: round(weight, 6)
                    for name, weight in zip(about.experts, weights[row], strict=True)
                    if weight
                },
                "rerouted": rerouted[row],
            }
            if samples.labels is not None:
                provenance["truth"] = int(samples.labels[row])
            yield PseudoSample(
                number=number,
                image=np.ascontiguousarray(logits_BC[row].numpy()[None, None]),
                label=int(logits_BC[row].argmax()),
                provenance=provenance,
            )


class Question:
    """Samples put to the replicas of one expert, by turns until one answers."""

    def __init__(
        self, batch: SubBatch, images: torch.Tensor, replicas: list[ActorHandle], turn: int
    ) -> None:
        self.batch = batch
        self._images, self._replicas, self._turn = images, replicas, turn
        self._ticket = self._ask()

    def _ask(self) -> ray.ObjectRef:
        return self._replicas[self._turn % len(self._replicas)].logits.remote(self._images)

    def answer(self, deadline: float) -> torch.Tensor:
        """Logits of the samples.

        Raises:
            RayTaskError: what the expert raised.
            RayError: no answer in time, or every replica is dead.
        """
        num_dead = 0
        while True:
            try:
                return ray.get(self._ticket, timeout=max(FETCH_S, deadline - time.monotonic()))
            except (ray.exceptions.RayTaskError, ray.exceptions.GetTimeoutError):
                raise
            except _DEAD:
                num_dead += 1
                if num_dead == len(self._replicas):
                    raise
            except ray.exceptions.RayError:
                # The replica, or the node that kept its answer, went. It may come up again once
                # the cluster knows.
                num_dead = 0
                if time.monotonic() > deadline:
                    raise
                time.sleep(ASK_AGAIN_S)
            self._turn += 1
            self._ticket = self._ask()


@dataclass(frozen=True)
class AnswerSettings:
    """How experts are asked.

    Attributes:
        missing: experts that are lost for good.
    """

    batch_size: int
    timeout_s: float
    degrade: bool
    missing: frozenset[int]


def _pairs(routes: Routes) -> tuple[int, ...]:
    return tuple(routes.active_BM.sum(dim=0).tolist())
