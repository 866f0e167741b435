"""Ray tasks of a layer search: batches of episodes, the one-shot set, the exported model.

Plain functions of what is asked and the store.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from dist_tl.config import StrictModel
from dist_tl.jobs.layer_search_features import FeatureFiles, read_features
from dist_tl.jobs.layer_search_spec import TrainedArmsConfig
from dist_tl.methods.layer_search.classifiers import ridge_head
from dist_tl.methods.layer_search.episodes import Episode, EpisodesConfig, draw_episode
from dist_tl.methods.layer_search.evaluate import (
    one_shot_set,
    score_episode,
    select_by_views,
)
from dist_tl.methods.layer_search.features import PoolingConfig
from dist_tl.methods.layer_search.gram import layer_grams, one_hot
from dist_tl.methods.layer_search.search import (
    Branch,
    SearchConfig,
    Selection,
    select_layers,
)
from dist_tl.models.layer_set import count_blocks
from dist_tl.models.networks import Network, build_network, replace_head, with_layers
from dist_tl.seeds import numpy_rng, torch_rng
from dist_tl.storage import layout
from dist_tl.storage.objects import ObjectStore
from dist_tl.train.models import load_classifier, model_files
from dist_tl.train.rows import RowsSpec, load_rows

ReadRows = Callable[[NDArray[np.int64]], Tensor]


class OneShotAsked(StrictModel):
    """Find the set for tasks with one label a class."""

    seed: int
    features: FeatureFiles
    ways: int
    queries: int
    episodes: int
    search: SearchConfig


class OneShotAnswer(StrictModel):
    """That set."""

    layers: tuple[int, ...]
    seconds: float


class EpisodesAsked(StrictModel):
    """A batch of episodes of one number of shots."""

    seed: int
    features: FeatureFiles
    episodes: EpisodesConfig
    shots: int
    first: int
    count: int
    search: SearchConfig
    fixed: tuple[int, ...] | None = None
    views: tuple[FeatureFiles, ...] = Field((), description="Features of augmented views.")
    trained: TrainedArmsConfig | None = None
    teacher: str = ""


class EpisodeAnswer(StrictModel):
    """One episode."""

    single: tuple[float, ...]
    all_layers: float
    random: float
    selected: float
    oracle: float
    layers: tuple[int, ...]
    branch: Branch
    adopted: bool
    z: tuple[float, ...]
    scratch: float | None = None
    fine_tuned: float | None = None


class ExportAsked(StrictModel):
    """Choose layers for the whole target task, and export models with a head on them."""

    seed: int
    teacher: str
    features: FeatureFiles
    pooling: PoolingConfig
    shots: int
    queries: int
    search: SearchConfig
    trained: TrainedArmsConfig | None


class ExportAnswer(StrictModel):
    """What was exported; accuracies on images that were not used."""

    layers: tuple[int, ...]
    accuracy: float
    fine_tuned: float | None
    teacher_accuracy: float = Field(description="Of the penultimate layer alone.")
    models: tuple[str, ...]
    seconds: float


class EpisodesAnswer(StrictModel):
    """A batch of them."""

    episodes: tuple[EpisodeAnswer, ...]
    seconds: float


def find_one_shot_set(asked: OneShotAsked, store: ObjectStore) -> OneShotAnswer:
    """One-shot episodes of held-out classes decide before any target support is read."""
    began = time.monotonic()
    phis = read_features(store.url, asked.features.keys)
    labels_N = load_rows(RowsSpec(data=asked.features.data)).labels
    ways = min(asked.ways, len(np.unique(labels_N)))
    config = EpisodesConfig(ways=ways, shots=(1,), queries=asked.queries, count=asked.episodes)
    episodes = []
    for index in range(asked.episodes):
        episode = draw_episode(labels_N, config, 1, seed=asked.seed, index=index)
        gram_LES, support_S, query_Q = _tensors(phis, episode)
        episodes.append((gram_LES, support_S, query_Q))
    layers = one_shot_set(episodes, asked.search)
    return OneShotAnswer(layers=layers, seconds=time.monotonic() - began)


def run_episodes(asked: EpisodesAsked, store: ObjectStore) -> EpisodesAnswer:
    """Select and score, episode by episode; the selection sees the support's Gram matrix alone."""
    began = time.monotonic()
    phis = read_features(store.url, asked.features.keys)
    rows = load_rows(RowsSpec(data=asked.features.data))
    answers = []
    for index in range(asked.first, asked.first + asked.count):
        episode = draw_episode(
            rows.labels, asked.episodes, asked.shots, seed=asked.seed, index=index
        )
        answer = _one_episode(asked, phis, episode, index, store)
        if asked.trained is not None and index < asked.trained.episodes:
            answer = answer.model_copy(
                update={
                    arm: _trained_accuracy(asked, arm, rows.tensor, episode, index, store)
                    for arm in asked.trained.arms
                }
            )
        answers.append(answer)
    return EpisodesAnswer(episodes=tuple(answers), seconds=time.monotonic() - began)


def export_selected(asked: ExportAsked, store: ObjectStore) -> ExportAnswer:
    """One episode of all classes: its layers, as a network that can be loaded and fine-tuned."""
    began = time.monotonic()
    rows = load_rows(RowsSpec(data=asked.features.data))
    ways = rows.num_classes
    config = EpisodesConfig(ways=ways, shots=(asked.shots,), queries=asked.queries, count=1)
    episode = draw_episode(rows.labels, config, asked.shots, seed=asked.seed, index=0)
    # An episode names its classes in the order drawn; a model's are those of the data.
    support_S = torch.from_numpy(rows.labels[episode.support_S])
    queries = rows.tensor(episode.query_Q)
    query_Q = torch.from_numpy(rows.labels[episode.query_Q])
    phis = read_features(store.url, asked.features.keys)
    rng = numpy_rng(asked.seed, "export shuffles")
    gram_LSS = layer_grams(phis, torch.from_numpy(episode.support_S))
    selection = select_layers(gram_LSS, support_S, asked.search, rng=rng)
    last = (len(phis) - 1,)
    networks = {
        layers: _headed(asked, layers, phis, episode.support_S, support_S, ways, store)
        for layers in dict.fromkeys((selection.layers, last))
    }
    network, models = networks[selection.layers], ["selected"]
    _save(network, f"selected-k{asked.shots}", store)
    fine_tuned = None
    accuracy = _accuracy(network, queries, query_Q)
    if asked.trained is not None:
        torch_seed = torch_rng(asked.seed, "export fine-tuning")
        images = rows.tensor(episode.support_S)
        _train(network.train(), images, support_S, asked.trained, torch_seed)
        _save(network, f"selected-k{asked.shots}-fine_tuned", store)
        models.append("selected, fine-tuned")
        fine_tuned = _accuracy(network, queries, query_Q)
    return ExportAnswer(
        layers=selection.layers,
        accuracy=accuracy,
        fine_tuned=fine_tuned,
        teacher_accuracy=_accuracy(networks[last], queries, query_Q),
        models=tuple(models),
        seconds=time.monotonic() - began,
    )


def _headed(
    asked: ExportAsked,
    layers: tuple[int, ...],
    phis: tuple[Tensor, ...],
    rows_S: NDArray[np.int64],
    labels_S: Tensor,
    ways: int,
    store: ObjectStore,
) -> Network:
    """The teacher with a ridge head on some layers."""
    teacher = load_classifier(store, asked.teacher).eval()
    joined_SD = torch.cat([phis[layer][rows_S] for layer in layers], dim=1) / len(layers) ** 0.5
    penalty = asked.search.classifier.penalty
    weight_CD, bias_C = ridge_head(joined_SD.double(), one_hot(labels_S, ways), penalty)
    # The last layer is the head's input, whatever was left out before it as its double.
    depth = count_blocks(teacher.trunk, teacher.image_shape)
    blocks = tuple(depth - 1 if layer == len(phis) - 1 else layer for layer in layers)
    cells = asked.pooling.cells
    return with_layers(teacher, blocks, cells=cells, weight_CD=weight_CD, bias_C=bias_C).eval()


@torch.no_grad()
def _accuracy(network: Network, images: Tensor, labels_Q: Tensor) -> float:
    return float((network.eval()(images).argmax(dim=1) == labels_Q).double().mean())


def _save(network: Network, name: str, store: ObjectStore) -> None:
    for file, data in model_files(network).items():
        store.write(f"{layout.model_prefix(name, 0)}/{file}", data)


def _tensors(phis: tuple[Tensor, ...], episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
    items_E = torch.from_numpy(np.concatenate([episode.support_S, episode.query_Q]))
    support_S = torch.from_numpy(episode.support_labels_S)
    return (
        layer_grams(phis, items_E, len(support_S)),
        support_S,
        torch.from_numpy(episode.query_labels_Q),
    )


def _one_episode(
    asked: EpisodesAsked,
    phis: tuple[Tensor, ...],
    episode: Episode,
    index: int,
    store: ObjectStore,
) -> EpisodeAnswer:
    gram_LES, support_S, query_Q = _tensors(phis, episode)
    size = len(support_S)
    if asked.views:
        selection = _select_by_views(asked, episode, support_S, store)
    else:
        selection = select_layers(
            gram_LES[:, :size],
            support_S,
            asked.search,
            rng=numpy_rng(asked.seed, "label shuffles", asked.shots, index),
            fixed=asked.fixed,
        )
    scores = score_episode(
        gram_LES,
        support_S,
        query_Q,
        selection,
        asked.search,
        rng=numpy_rng(asked.seed, "random sets", asked.shots, index),
    )
    return EpisodeAnswer(
        single=scores.single,
        all_layers=scores.all_layers,
        random=scores.random,
        selected=scores.selected,
        oracle=scores.oracle,
        layers=selection.layers,
        branch=selection.branch,
        adopted=selection.adopted,
        z=selection.single_z,
    )


def _select_by_views(
    asked: EpisodesAsked, episode: Episode, support_S: Tensor, store: ObjectStore
) -> Selection:
    views = [read_features(store.url, files.keys) for files in asked.views]
    joined = [
        torch.cat([view[layer][episode.support_S] for view in views])
        for layer in range(len(views[0]))
    ]
    gram_LVV = layer_grams(joined, torch.arange(len(joined[0])))
    return select_by_views(gram_LVV, support_S, len(views), asked.search)


def _trained_accuracy(
    asked: EpisodesAsked,
    arm: str,
    tensor: ReadRows,
    episode: Episode,
    index: int,
    store: ObjectStore,
) -> float:
    """A whole network trained on the support: from scratch, or from the teacher's weights."""
    assert asked.trained is not None, "asked for trained arms"
    images, queries = tensor(episode.support_S), tensor(episode.query_Q)
    labels_S = torch.from_numpy(episode.support_labels_S)
    rng = torch_rng(asked.seed, f"{arm} episode", asked.shots, index)
    ways = asked.episodes.ways
    if arm == "scratch":
        network = build_network(
            asked.trained.network,
            num_classes=ways,
            image_shape=tuple(images.shape[1:]),
            rng=rng,
        )
    else:
        network = replace_head(load_classifier(store, asked.teacher), ways, rng).train()
    _train(network, images, labels_S, asked.trained, rng)
    with torch.no_grad():
        right_Q = network.eval()(queries).argmax(dim=1).numpy() == episode.query_labels_Q
    return float(right_Q.mean())


def _train(
    network: Network,
    images: Tensor,
    labels_S: Tensor,
    config: TrainedArmsConfig,
    rng: torch.Generator,
) -> None:
    rates = config.training.optimizer
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=rates.learning_rate, weight_decay=rates.weight_decay
    )
    size = min(config.training.batch_size, len(images))
    for _ in range(config.training.steps):
        rows = torch.randperm(len(images), generator=rng)[:size]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(images[rows]), labels_S[rows]).backward()
        optimizer.step()
