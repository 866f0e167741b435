"""Ray tasks of a layer search: layer vectors, the one-shot set, episodes, the exported model.

Vectors are computed once; an episode then needs only their inner products.
"""

import time
from functools import lru_cache

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.datasets.images import LabelledImages
from dist_tl.datasets.views import Views
from dist_tl.jobs.layer_search.plan import (
    NUM_VIEWS,
    EpisodesInputs,
    FeaturesInputs,
    LayerSearchPlan,
    draw_items,
    export_episodes,
)
from dist_tl.jobs.layer_search.spec import LayerSearchJob
from dist_tl.jobs.spec import BudgetConfig
from dist_tl.jobs.stages import drawn_items
from dist_tl.jobs.teacher import teacher_location
from dist_tl.methods.layer_search.episodes import Episode, EpisodesConfig
from dist_tl.methods.layer_search.evaluate import (
    EpisodeScores,
    one_shot_set,
    score_episode,
)
from dist_tl.methods.layer_search.features import layer_vectors, num_zero_vectors
from dist_tl.methods.layer_search.gram import LayerSet, layer_grams, one_hot
from dist_tl.methods.layer_search.search import Branch, select_layers
from dist_tl.methods.layer_search.support import (
    accuracy,
    episode_tensors,
    layers_head,
    select_for_episode,
    train_on_support,
)
from dist_tl.models.layer_set import count_blocks
from dist_tl.models.networks import Network, build_network, replace_head, with_layers
from dist_tl.seeds import numpy_rng, torch_rng
from dist_tl.storage import layout
from dist_tl.storage.model_files import write_model_files
from dist_tl.storage.objects import ObjectStore
from dist_tl.storage.tensors import read_tensors, write_tensors
from dist_tl.train.models import load_classifier, model_files
from dist_tl.train.rows import RowsSpec, load_rows

BATCH = 256


class FeaturesOutput(StrictModel):
    """Summary of the stored vectors."""

    widths: tuple[int, ...] = Field(description="Vector width of every layer, penultimate last.")
    zeros: int = Field(description="Number of zero vectors over all layers.")
    seconds: float


class OneShotOutput(StrictModel):
    """The layers for tasks with one label a class."""

    layers: LayerSet
    seconds: float


class EpisodeResult(StrictModel):
    """Accuracies and selection of one episode."""

    scores: EpisodeScores
    layers: LayerSet
    branch: Branch
    adopted: bool
    z: tuple[float, ...]
    trained: dict[str, float] = Field(description="Accuracy of each trained arm.")


class EpisodesOutput(StrictModel):
    """Results of a batch of episodes."""

    episodes: tuple[EpisodeResult, ...]
    seconds: float


class ExportOutput(StrictModel):
    """Selected layers, and accuracies of the exported models on unused images."""

    layers: LayerSet
    accuracy: float
    fine_tuned: float | None
    teacher_accuracy: float = Field(description="Accuracy with the penultimate layer alone.")
    seconds: float


@torch.no_grad()
def compute_features(inputs: FeaturesInputs, store: ObjectStore) -> FeaturesOutput:
    """Stores the unit vectors of all layers for a range of rows, from one forward pass."""
    began, job, features, parts = time.monotonic(), inputs.job, inputs.features, []
    rows, views = load_rows(RowsSpec(data=features.data)), Views(features.data.views)
    network = load_classifier(store, features.model, image_shape=rows.image_shape).eval()
    for start in range(inputs.first, inputs.last, BATCH):
        indices = np.arange(start, min(start + BATCH, inputs.last))
        images = rows.tensor(indices)
        if features.view is not None:  # seeded by row, so batches do not matter
            rngs = [torch_rng(job.seed, "augmented view", features.view, int(i)) for i in indices]
            images = torch.cat(
                [views.weak(image[None], rng) for image, rng in zip(images, rngs, strict=True)]
            )
        parts.append(layer_vectors(network.blocks(images), job.pooling))
    layers = [torch.cat(columns) for columns in zip(*parts, strict=True)]
    write_tensors(store, inputs.key, {f"{i:04d}": v for i, v in enumerate(layers)})
    return FeaturesOutput(
        widths=tuple(phi_ND.shape[1] for phi_ND in layers),
        zeros=sum(map(num_zero_vectors, layers)),
        seconds=time.monotonic() - began,
    )


# A worker runs many batches of episodes over the same vectors.
@lru_cache(maxsize=8)
def read_vectors(url: str, keys: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Returns the (N, D) float64 unit vectors of every layer, from a store at `url`."""
    store = ObjectStore(url)
    parts = [read_tensors(store, key) for key in keys]
    # Converted to float64 once, not in every episode.
    return tuple(torch.cat([part[name] for part in parts]).double() for name in sorted(parts[0]))


def find_one_shot_set(job: LayerSearchJob, store: ObjectStore) -> OneShotOutput:
    """Selects layers by one-shot episodes of held-out classes, without any target support."""
    began = time.monotonic()
    assert job.held_out is not None, "planned only for jobs with held-out classes"
    phis = read_vectors(store.url, LayerSearchPlan(job).vector_keys("held-out"))
    rows = load_rows(RowsSpec(data=job.held_out.data))
    ways = min(job.episodes.ways, len(np.unique(rows.labels[drawn_items(job, rows)])))
    config = EpisodesConfig(ways=ways, shots=(1,), queries=job.episodes.queries)
    episodes = []
    for index in range(job.held_out.episodes):
        episode = draw_items(job, rows, config, 1, index)
        episodes.append(episode_tensors(phis, episode))
    layers = one_shot_set(episodes, job.search)
    return OneShotOutput(layers=layers, seconds=time.monotonic() - began)


def run_episodes(inputs: EpisodesInputs, store: ObjectStore) -> EpisodesOutput:
    """Selects layers and scores all arms, episode by episode.

    The selection reads only the Gram matrices of the support.
    """
    began, job, results = time.monotonic(), inputs.job, []
    plan, by_views = LayerSearchPlan(job), job.search.one_shot == "augmented_views"
    names = [f"view{view}" for view in range(NUM_VIEWS) if by_views and inputs.shots == 1]
    views = [read_vectors(store.url, plan.vector_keys(name)) for name in names]
    phis = read_vectors(store.url, plan.vector_keys("target"))
    rows = load_rows(RowsSpec(data=job.data))
    last = min(inputs.first + job.episodes_per_task, job.episodes.count)
    for index in range(inputs.first, last):
        episode = draw_items(job, rows, job.episodes, inputs.shots, index)
        tensors = episode_tensors(phis, episode)
        rng = numpy_rng(job.seed, "label shuffles", inputs.shots, index)
        selection = select_for_episode(
            tensors[0], episode, views, job.search, rng=rng, fixed=inputs.one_shot
        )
        rng = numpy_rng(job.seed, "random sets", inputs.shots, index)
        result = EpisodeResult(
            scores=score_episode(*tensors, selection, job.search, rng=rng),
            layers=selection.layers,
            branch=selection.branch,
            adopted=selection.adopted,
            z=selection.single_z,
            trained=_trained_accuracies(inputs, index, episode, rows, store),
        )
        results.append(result)
    return EpisodesOutput(episodes=tuple(results), seconds=time.monotonic() - began)


def _trained_accuracies(
    inputs: EpisodesInputs, index: int, episode: Episode, rows: LabelledImages, store: ObjectStore
) -> dict[str, float]:
    """Trains a whole network on the support for each trained arm; returns query accuracies."""
    job, ways = inputs.job, inputs.job.episodes.ways
    if job.trained is None or index >= job.trained.episodes:
        return {}
    images, labels_S = rows.tensor(episode.support_S), torch.from_numpy(episode.support_labels_S)
    queries = (rows.tensor(episode.query_Q), torch.from_numpy(episode.query_labels_Q))
    accuracies = {}
    for arm in job.trained.arms:
        rng = torch_rng(job.seed, f"{arm} episode", inputs.shots, index)
        if arm == "scratch":
            config, shape = job.trained.network, rows.image_shape
            network = build_network(config, num_classes=ways, image_shape=shape, rng=rng)
        else:
            teacher = load_classifier(store, teacher_location(job.teacher))
            network = replace_head(teacher, ways, rng)
        _train(network, images, labels_S, job.trained.training, rng)
        accuracies[arm] = accuracy(network, *queries)
    return accuracies


def _train(
    network: Network, images: Tensor, labels_S: Tensor, budget: BudgetConfig, rng: torch.Generator
) -> None:
    rates, steps, batch_size = budget.optimizer, budget.steps, budget.batch_size
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=rates.learning_rate, weight_decay=rates.weight_decay
    )
    train_on_support(network, optimizer, images, labels_S, rng, steps=steps, batch_size=batch_size)


def export_selected(job: LayerSearchJob, store: ObjectStore) -> ExportOutput:
    """Selects layers in one episode of all classes and saves them as a loadable network."""
    began, config, fine_tuned = time.monotonic(), export_episodes(job), None
    rows, name = load_rows(RowsSpec(data=job.data)), f"selected-k{job.export_shots}"
    episode = draw_items(job, rows, config, config.shots[0], 0)
    support_S = torch.from_numpy(episode.support_S)
    # An episode numbers its classes in the order drawn; a model numbers them as the data does.
    labels_S = torch.from_numpy(rows.labels[episode.support_S])
    queries = (rows.tensor(episode.query_Q), torch.from_numpy(rows.labels[episode.query_Q]))
    phis = read_vectors(store.url, LayerSearchPlan(job).vector_keys("target"))
    rng = numpy_rng(job.seed, "export shuffles")
    selection = select_layers(layer_grams(phis, support_S), labels_S, job.search, rng=rng)
    teacher = load_classifier(store, teacher_location(job.teacher)).eval()
    depth = count_blocks(teacher.trunk, teacher.image_shape)

    def with_head(layers: LayerSet) -> Network:
        penalty = job.search.classifier.penalty
        vectors = [phis[layer][support_S] for layer in layers]
        weight_CD, bias_C = layers_head(vectors, one_hot(labels_S, rows.num_classes), penalty)
        # The last layer is the head's input; a block equal to it may have been left out before it.
        blocks = tuple(depth - 1 if layer == len(phis) - 1 else layer for layer in layers)
        cells = job.pooling.cells
        return with_layers(teacher, blocks, cells=cells, weight_CD=weight_CD, bias_C=bias_C)

    network = with_head(selection.layers)
    selected = accuracy(network, *queries)
    _save(network, name, store)
    if job.trained is not None:
        torch_seed = torch_rng(job.seed, "export fine-tuning")
        images = rows.tensor(episode.support_S)
        _train(network, images, labels_S, job.trained.training, torch_seed)
        fine_tuned = accuracy(network, *queries)
        _save(network, f"{name}-fine_tuned", store)
    return ExportOutput(
        layers=selection.layers,
        accuracy=selected,
        fine_tuned=fine_tuned,
        teacher_accuracy=accuracy(with_head((len(phis) - 1,)), *queries),
        seconds=time.monotonic() - began,
    )


def _save(network: Network, name: str, store: ObjectStore) -> None:
    write_model_files(store, layout.model_prefix(name, 0), model_files(network))
