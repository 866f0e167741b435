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
from dist_tl.jobs.layer_search.features import FeatureFiles, read_features
from dist_tl.jobs.layer_search.spec import TrainedArmsConfig
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


class OneShotInputs(StrictModel):
    """Find the set for tasks with one label a class."""

    seed: int
    features: FeatureFiles
    ways: int
    queries: int
    episodes: int
    search: SearchConfig


class OneShotOutput(StrictModel):
    """That set."""

    layers: tuple[int, ...]
    seconds: float


class EpisodesInputs(StrictModel):
    """A batch of episodes of one number of shots."""

    seed: int
    features: FeatureFiles
    episodes: EpisodesConfig
    shots: int
    first: int
    count: int
    search: SearchConfig
    fixed: tuple[int, ...] | None = None
    views: tuple[FeatureFiles, ...] = Field(default=(), description="Features of augmented views.")
    trained: TrainedArmsConfig | None = None
    teacher: str = ""


class EpisodeScore(StrictModel):
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


class ExportInputs(StrictModel):
    """Choose layers for the whole target task, and export models with a head on them."""

    seed: int
    teacher: str
    features: FeatureFiles
    pooling: PoolingConfig
    shots: int
    queries: int
    search: SearchConfig
    trained: TrainedArmsConfig | None


class ExportOutput(StrictModel):
    """What was exported; accuracies on images that were not used."""

    layers: tuple[int, ...]
    accuracy: float
    fine_tuned: float | None
    teacher_accuracy: float = Field(description="Of the penultimate layer alone.")
    models: tuple[str, ...]
    seconds: float


class EpisodesOutput(StrictModel):
    """A batch of them."""

    episodes: tuple[EpisodeScore, ...]
    seconds: float


def find_one_shot_set(inputs: OneShotInputs, store: ObjectStore) -> OneShotOutput:
    """One-shot episodes of held-out classes decide before any target support is read."""
    began = time.monotonic()
    phis = read_features(store.url, inputs.features.keys)
    labels_N = load_rows(RowsSpec(data=inputs.features.data)).labels
    ways = min(inputs.ways, len(np.unique(labels_N)))
    config = EpisodesConfig(ways=ways, shots=(1,), queries=inputs.queries, count=inputs.episodes)
    episodes = []
    for index in range(inputs.episodes):
        episode = draw_episode(labels_N, config, 1, seed=inputs.seed, index=index)
        gram_LES, support_S, query_Q = _tensors(phis, episode)
        episodes.append((gram_LES, support_S, query_Q))
    layers = one_shot_set(episodes, inputs.search)
    return OneShotOutput(layers=layers, seconds=time.monotonic() - began)


def run_episodes(inputs: EpisodesInputs, store: ObjectStore) -> EpisodesOutput:
    """Select and score, episode by episode; the selection sees the support's Gram matrix alone."""
    began = time.monotonic()
    phis = read_features(store.url, inputs.features.keys)
    rows = load_rows(RowsSpec(data=inputs.features.data))
    answers = []
    for index in range(inputs.first, inputs.first + inputs.count):
        episode = draw_episode(
            rows.labels, inputs.episodes, inputs.shots, seed=inputs.seed, index=index
        )
        answer = _one_episode(inputs, phis, episode, index, store)
        if inputs.trained is not None and index < inputs.trained.episodes:
            answer = answer.model_copy(
                update={
                    arm: _trained_accuracy(inputs, arm, rows.tensor, episode, index, store)
                    for arm in inputs.trained.arms
                }
            )
        answers.append(answer)
    return EpisodesOutput(episodes=tuple(answers), seconds=time.monotonic() - began)


def export_selected(inputs: ExportInputs, store: ObjectStore) -> ExportOutput:
    """One episode of all classes: its layers, as a network that can be loaded and fine-tuned."""
    began = time.monotonic()
    rows = load_rows(RowsSpec(data=inputs.features.data))
    ways = rows.num_classes
    config = EpisodesConfig(ways=ways, shots=(inputs.shots,), queries=inputs.queries, count=1)
    episode = draw_episode(rows.labels, config, inputs.shots, seed=inputs.seed, index=0)
    # An episode names its classes in the order drawn; a model's are those of the data.
    support_S = torch.from_numpy(rows.labels[episode.support_S])
    queries = rows.tensor(episode.query_Q)
    query_Q = torch.from_numpy(rows.labels[episode.query_Q])
    phis = read_features(store.url, inputs.features.keys)
    rng = numpy_rng(inputs.seed, "export shuffles")
    gram_LSS = layer_grams(phis, torch.from_numpy(episode.support_S))
    selection = select_layers(gram_LSS, support_S, inputs.search, rng=rng)
    last = (len(phis) - 1,)
    networks = {
        layers: _headed(inputs, layers, phis, episode.support_S, support_S, ways, store)
        for layers in dict.fromkeys((selection.layers, last))
    }
    network, models = networks[selection.layers], ["selected"]
    _save(network, f"selected-k{inputs.shots}", store)
    fine_tuned = None
    accuracy = _accuracy(network, queries, query_Q)
    if inputs.trained is not None:
        torch_seed = torch_rng(inputs.seed, "export fine-tuning")
        images = rows.tensor(episode.support_S)
        _train(network.train(), images, support_S, inputs.trained, torch_seed)
        _save(network, f"selected-k{inputs.shots}-fine_tuned", store)
        models.append("selected, fine-tuned")
        fine_tuned = _accuracy(network, queries, query_Q)
    return ExportOutput(
        layers=selection.layers,
        accuracy=accuracy,
        fine_tuned=fine_tuned,
        teacher_accuracy=_accuracy(networks[last], queries, query_Q),
        models=tuple(models),
        seconds=time.monotonic() - began,
    )


def _headed(
    inputs: ExportInputs,
    layers: tuple[int, ...],
    phis: tuple[Tensor, ...],
    rows_S: NDArray[np.int64],
    labels_S: Tensor,
    ways: int,
    store: ObjectStore,
) -> Network:
    """The teacher with a ridge head on some layers."""
    teacher = load_classifier(store, inputs.teacher).eval()
    joined_SD = torch.cat([phis[layer][rows_S] for layer in layers], dim=1) / len(layers) ** 0.5
    penalty = inputs.search.classifier.penalty
    weight_CD, bias_C = ridge_head(joined_SD.double(), one_hot(labels_S, ways), penalty)
    # The last layer is the head's input, whatever was left out before it as its double.
    depth = count_blocks(teacher.trunk, teacher.image_shape)
    blocks = tuple(depth - 1 if layer == len(phis) - 1 else layer for layer in layers)
    cells = inputs.pooling.cells
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
    inputs: EpisodesInputs,
    phis: tuple[Tensor, ...],
    episode: Episode,
    index: int,
    store: ObjectStore,
) -> EpisodeScore:
    gram_LES, support_S, query_Q = _tensors(phis, episode)
    size = len(support_S)
    if inputs.views:
        selection = _select_by_views(inputs, episode, support_S, store)
    else:
        selection = select_layers(
            gram_LES[:, :size],
            support_S,
            inputs.search,
            rng=numpy_rng(inputs.seed, "label shuffles", inputs.shots, index),
            fixed=inputs.fixed,
        )
    scores = score_episode(
        gram_LES,
        support_S,
        query_Q,
        selection,
        inputs.search,
        rng=numpy_rng(inputs.seed, "random sets", inputs.shots, index),
    )
    return EpisodeScore(
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
    inputs: EpisodesInputs, episode: Episode, support_S: Tensor, store: ObjectStore
) -> Selection:
    views = [read_features(store.url, files.keys) for files in inputs.views]
    joined = [
        torch.cat([view[layer][episode.support_S] for view in views])
        for layer in range(len(views[0]))
    ]
    gram_LVV = layer_grams(joined, torch.arange(len(joined[0])))
    return select_by_views(gram_LVV, support_S, len(views), inputs.search)


def _trained_accuracy(
    inputs: EpisodesInputs,
    arm: str,
    tensor: ReadRows,
    episode: Episode,
    index: int,
    store: ObjectStore,
) -> float:
    """A whole network trained on the support: from scratch, or from the teacher's weights."""
    assert inputs.trained is not None, "asked for trained arms"
    images, queries = tensor(episode.support_S), tensor(episode.query_Q)
    labels_S = torch.from_numpy(episode.support_labels_S)
    rng = torch_rng(inputs.seed, f"{arm} episode", inputs.shots, index)
    ways = inputs.episodes.ways
    if arm == "scratch":
        network = build_network(
            inputs.trained.network,
            num_classes=ways,
            image_shape=tuple(images.shape[1:]),
            rng=rng,
        )
    else:
        network = replace_head(load_classifier(store, inputs.teacher), ways, rng).train()
    _train(network, images, labels_S, inputs.trained, rng)
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
