"""Router actors: each predicts one shard at a time, with the logits of the expert actors."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnschedulableError,
    GetTimeoutError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from dist_tl.cluster.inputs import RowsInput, Samples, StageInput, read_samples
from dist_tl.cluster.outcomes import unwrap_error
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

RETRY_S = 0.5
FETCH_S = 5.0  # a result may be finished and still need a transfer from another node
_DEAD = (ActorDiedError, ActorUnschedulableError, OutOfMemoryError, RuntimeEnvSetupError)


@dataclass(frozen=True)
class ShardResult:
    """The result of one shard.

    Attributes:
        pairs: number of (sample, expert) pairs, by expert.
        lost: unavailable experts with the reason; unless they may be left out, nothing was
            committed.
        entry: entry of the committed predictions; None if a required expert was lost.
    """

    index: int
    pairs: tuple[int, ...]
    lost: dict[int, str]
    entry: ShardEntry | None


@dataclass(frozen=True)
class RequestSettings:
    """How a router calls the experts.

    Attributes:
        batch_size: maximum number of samples per request.
        timeout_s: seconds until an expert that does not respond is lost.
        degrade: predict without lost experts.
        missing: experts that are already lost.
    """

    batch_size: int
    timeout_s: float
    degrade: bool
    missing: frozenset[int]


class RouterActor:
    """The router and the aggregator of a hub."""

    def __init__(self, store_url: str, location: str, threads: int, attempt: int) -> None:
        torch.set_num_threads(threads)
        self._store = ObjectStore(store_url)
        self._attempt = Attempt(self._store, attempt)
        self._location = location

    def open(self) -> None:
        """Loads router and aggregator.

        Raises:
            ConfigError: files are missing or damaged.
        """
        self._hub = load_router(self._store, self._location)

    def predict(
        self,
        source: StageInput | RowsInput,
        plan: ShardPlan,
        index: int,
        experts: list[list[ActorHandle]],
        settings: RequestSettings,
    ) -> ShardResult:
        """Predicts and commits one shard. Deterministic for the same set of lost experts.

        Args:
            plan: shard plan of the predictions.
            experts: the replicas of each expert, in the order of the hub.
        """
        committed = read_entry(self._store, plan.stage, index)
        if committed is not None:
            return ShardResult(index, (0,) * len(experts), {}, committed)
        samples = read_samples(source, index)
        missing, reasons = settings.missing, dict[int, str]()
        while True:
            routes, intended = self._routes(samples.images, missing)
            results, lost = self._request(samples, routes, experts, index, settings)
            if not lost:
                break
            missing, reasons = missing | lost.keys(), reasons | lost
            if not settings.degrade:
                return ShardResult(index, _pairs(routes), reasons, None)
        self._attempt.check()
        entry = write_shard(
            plan.order(index),
            self._predictions(samples, routes, intended, results, plan.order(index).numbers),
            self._store,
        )
        return ShardResult(index, _pairs(routes), reasons, entry)

    def _request(
        self,
        samples: Samples,
        routes: Routes,
        experts: list[list[ActorHandle]],
        index: int,
        settings: RequestSettings,
    ) -> tuple[list[tuple[SubBatch, torch.Tensor]], dict[int, str]]:
        """Returns the logits of every expert, and the experts that failed, with the reason."""
        deadline = time.monotonic() + settings.timeout_s
        requests = [
            # Round robin over the replicas; the choice of the replica does not change the result.
            ExpertRequest(batch, samples.images[batch.rows_S], experts[batch.expert], turn)
            for turn, batch in enumerate(sub_batches(routes.active_BM, settings.batch_size), index)
        ]
        results, lost = [], dict[int, str]()
        for request in requests:
            expert = request.batch.expert
            if expert in lost:
                continue
            try:
                results.append((request.batch, request.result(deadline)))
            except RayTaskError as error:
                name = self._hub.description.experts[expert]
                raise unwrap_error(error, f"expert {name}") from None
            except RayError as error:
                lost[expert] = str(error).strip().splitlines()[0]
        return results, lost

    @torch.no_grad()
    def _routes(self, images: torch.Tensor, missing: frozenset[int]) -> tuple[Routes, Routes]:
        """Returns the routes without missing experts, and the routes of the complete hub."""
        config, names = self._hub.description.routes, self._hub.description.experts
        if self._hub.router is None:
            z_BM = chance_logits(images, len(names))
        else:
            z_BM = noisy_logits(self._hub.router(images), None)
        try:
            return choose(z_BM, config, missing=missing), choose(z_BM, config)
        except ValueError as error:
            lost = ", ".join(names[i] for i in sorted(missing))
            raise WorkerError(f"experts lost: {lost}; {error}") from None

    @torch.no_grad()
    def _predictions(
        self,
        samples: Samples,
        routes: Routes,
        intended: Routes,
        results: list[tuple[SubBatch, torch.Tensor]],
        numbers: range,
    ) -> Iterator[PseudoSample]:
        names, num_classes = self._hub.description.experts, self._hub.description.num_classes
        expert_logits_BMC = place(results, len(samples.images), len(names), num_classes)
        logits_BC = combine(self._hub.aggregator, expert_logits_BMC, routes).float()
        rerouted = (routes.active_BM != intended.active_BM).any(dim=1).tolist()
        weights = routes.weight_BM.tolist()
        for row, number in enumerate(numbers):
            provenance = {
                "weights": {
                    name: round(weight, 6)
                    for name, weight in zip(names, weights[row], strict=True)
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


class ExpertRequest:
    """A batch for one expert, sent to its replicas in turn until one returns the logits."""

    def __init__(
        self, batch: SubBatch, images: torch.Tensor, replicas: list[ActorHandle], turn: int
    ) -> None:
        self.batch = batch
        self._images, self._replicas, self._turn = images, replicas, turn
        self._ref = self._send()

    def _send(self) -> ray.ObjectRef:
        return self._replicas[self._turn % len(self._replicas)].logits.remote(self._images)

    def result(self, deadline: float) -> torch.Tensor:
        """Returns the logits; `deadline` is a monotonic time in seconds.

        Raises:
            RayTaskError: the expert raised an error.
            RayError: no replica responded in time, or all of them are dead.
        """
        num_dead = 0
        while True:
            try:
                return ray.get(self._ref, timeout=max(FETCH_S, deadline - time.monotonic()))
            except (RayTaskError, GetTimeoutError):
                raise
            except _DEAD:
                num_dead += 1
                if num_dead == len(self._replicas):
                    raise
            except RayError:
                # The replica or the node with its result is lost; the replica may be restarted.
                num_dead = 0
                if time.monotonic() > deadline:
                    raise
                time.sleep(RETRY_S)
            self._turn += 1
            self._ref = self._send()


def _pairs(routes: Routes) -> tuple[int, ...]:
    return tuple(routes.active_BM.sum(dim=0).tolist())
