"""What `plan` and a new run say of a job's data, identical pictures and models."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import dist_tl.jobs.run
from dist_tl.cli import app as cli
from dist_tl.errors import ConfigError, DataError
from dist_tl.jobs.job_file import read_job
from dist_tl.jobs.layer_search.plan import draw_items
from dist_tl.jobs.overview import Overview, overview_of
from dist_tl.jobs.places import data_sets
from dist_tl.jobs.plan import plan_job
from dist_tl.jobs.run import run_job
from dist_tl.jobs.stages import target_rows
from dist_tl.methods.layer_search.episodes import EpisodesConfig
from dist_tl.models.files import save_network
from dist_tl.models.networks import build_network
from dist_tl.models.perceptron import PerceptronConfig
from dist_tl.storage.objects import ObjectStore
from dist_tl.telemetry import SilentProgress
from dist_tl.train.rows import FoldSpec, RowsSpec, load_rows

PRESETS = sorted((Path(__file__).parents[2] / "launch" / "presets").glob("*.yaml"))
BUDGET = {"steps": 1, "batch_size": 8}
NETWORK = {"kind": "perceptron", "hidden": 4}


class Said(SilentProgress):
    """Progress that remembers what was said."""

    def __init__(self):
        self.lines = []

    def say(self, line):
        self.lines.append(line)


def picture(number, side=4):
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))


def write_folder(root, classes, side=4):
    """Writes the numbered pictures of each class; files are named by their position."""
    for name, numbers in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for position, number in enumerate(numbers):
            picture(number, side).save(root / name / f"{position:03d}.png")
    return {"source": "folder", "path": str(root)}


def write_tar(path, numbers):
    with tarfile.open(path, "w") as archive:
        for position, number in enumerate(numbers):
            buffer = io.BytesIO()
            picture(number).save(buffer, "PNG")
            for suffix, data in (("png", buffer.getvalue()), ("cls", b"%d" % (position % 2))):
                member = tarfile.TarInfo(f"{position:03d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
        archive.addfile(tarfile.TarInfo("notes.md"), io.BytesIO())
    return {"source": "wds", "path": str(path)}


@pytest.fixture
def job_of(tmp_path):
    """Reads a job from the fields of its file."""

    def read(**fields):
        path = tmp_path / "job.yaml"
        path.write_text(yaml.safe_dump({"run": str(tmp_path / "run"), **fields}))
        return read_job(path)

    return read


def source_of(data):
    return {
        "data": data,
        "classifier": NETWORK,
        "classifier_training": BUDGET,
        "generator": {"channels": [8]},
        "generator_training": BUDGET,
    }


def transfer(source, target, **fields):
    return {
        "kind": "transfer",
        "seeds": 1,
        "source": source,
        "target": {
            "data": target,
            "labels_per_class": 2,
            "network": NETWORK,
            "training": BUDGET,
        },
        "arms": ["scratch"],
        "session": {"num_cpus": 9},
        **fields,
    }


def search(data, **fields):
    digits = {"source": "digits", "classes": [0, 1], "limit": 50}
    teacher = {"data": digits, "network": NETWORK, "training": BUDGET}
    episodes = {"ways": 2, "shots": [2], "queries": 3, "count": 20}
    return {
        "kind": "layer_search",
        "teacher": teacher,
        "data": data,
        "episodes": episodes,
        **fields,
    }


# Data.


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_the_data_of_every_preset_is_listed_with_its_classes(preset):
    job = read_job(preset)
    try:
        overview = overview_of(job)
    except (ConfigError, DataError) as error:
        if "forecast_cifar10" not in preset.stem:
            raise
        pytest.skip(f"its data is not here: {error}")
    assert overview.data.keys() == data_sets(job).keys()
    for field, config in data_sets(job).items():
        rows = load_rows(RowsSpec(data=config))
        found = overview.data[field]
        assert (found.images, found.image_shape) == (len(rows), rows.image_shape)
        assert sum(found.classes.values()) == len(rows)
        assert list(found.classes) == list(rows.class_names)
    assert not [row for row in overview.shared if row.first == row.second], "digits are distinct"
    assert Overview.model_validate_json(overview.model_dump_json()) == overview


def test_data_from_folders_tars_and_mixtures_is_listed(job_of, tmp_path):
    folder = write_folder(tmp_path / "pets", {"cat": range(10), "dog": range(10, 22)})
    (tmp_path / "pets/cat/readme.txt").write_text("x")
    (tmp_path / "pets/cat/.DS_Store").write_text("x")
    for number in range(2):
        (tmp_path / f"pets/dog/{number}.mp4").write_bytes(b"x")
    tar = {**write_tar(tmp_path / "a.tar", range(30, 50)), "size": 6, "channels": 1}
    mixture = {
        "source": "mixture",
        "domains": {"day": folder, "night": {**folder, "domain": {"invert": True}}},
    }
    overview = overview_of(job_of(**transfer(source_of(tar), mixture)))
    source, target = overview.data["source.data"], overview.data["target.data"]
    assert (source.classes, source.image_shape) == ({"0": 10, "1": 10}, (1, 6, 6))
    assert source.passed_over == {".md": 1}
    assert (target.classes, target.image_shape) == ({"cat": 20, "dog": 24}, (3, 4, 4))
    assert target.domains == ("day", "night")
    assert target.passed_over == {".mp4": 2, ".txt": 1}
    lines = list(overview.lines())
    assert lines == [
        "source.data: 20 images 6 x 6 grey (wds), 2 classes: 0 10, 1 10; 1 file passed over: 1 .md",
        "target.data: 44 images 4 x 4 colour (mixture), 2 classes: cat 20, dog 24; "
        "3 files passed over: 2 .mp4, 1 .txt",
    ]


def test_many_classes_are_told_by_the_smallest_the_median_and_the_largest(job_of, tmp_path):
    classes = {f"class{n:02d}": range(n * 100, n * 100 + 2 + n) for n in range(21)}
    data = write_folder(tmp_path / "many", classes)
    job = job_of(kind="predict", model="unused", data=data)
    overview = Overview(data={}, duplicates="allow", shared=(), models={})
    found = overview_of(job.model_copy(update={"model": write_model(tmp_path / "m")})).data
    assert len(found["data"].classes) == 21
    [line] = overview.model_copy(update={"data": found}).lines()
    assert "21 classes: smallest class00 2, median class10 12, largest class20 22" in line


# Models.


def write_model(place, classes=2):
    network = build_network(
        PerceptronConfig(kind="perceptron", hidden=4),
        num_classes=classes,
        image_shape=(3, 4, 4),
        rng=torch.Generator().manual_seed(0),
    )
    for name, data in save_network(network).items():
        ObjectStore(place).write(name, data)
    return str(place)


def test_a_model_is_listed_by_its_field_and_a_missing_one_is_named(job_of, tmp_path):
    data = write_folder(tmp_path / "pets", {"cat": range(10), "dog": range(10, 22)})
    place = write_model(tmp_path / "teacher", classes=7)
    table = plan_job(job_of(**search(data, teacher={"model": place})))
    found = table.overview.models["teacher.model"]
    assert (found.architecture, found.num_classes) == ("perceptron hidden 4", 7)
    assert found.parameters == 3 * 4 * 4 * 4 + 4 * 7 + 7
    titles = [table.title for table in table.overview.tables()]
    assert titles == ["Data", "Models"]
    job = job_of(**search(data, teacher={"model": str(tmp_path / "absent")}))
    with pytest.raises(ConfigError, match=r"teacher\.model: no model at .*absent"):
        plan_job(job)


# Identical pictures.


def pets(root, *, copies=True):
    """Two classes of 16 pictures; three cats twice more, and one dog also as a cat."""
    extra = [0, 1, 2, 0, 1, 2, 100] if copies else []
    return write_folder(root, {"cat": [*range(16), *extra], "dog": range(100, 116)})


def rows_of(overview):
    return {(row.first, row.second): row for row in overview.shared}


def test_copies_within_data_are_reported_with_their_labels(job_of, tmp_path):
    job = job_of(**transfer(source_of({"source": "digits"}), pets(tmp_path / "pets")))
    [row] = overview_of(job).shared
    assert (row.first, row.second) == ("target.data", "target.data")
    assert (row.pictures, row.labels_differ) == (4, 1)
    assert [Path(name).name for name in row.example] == ["000.png", "016.png"]
    assert "4 pictures more than once in target.data, 1 of them with different labels" in row.text


def test_pictures_in_two_roles_are_counted_by_pair(job_of, tmp_path):
    source = write_folder(tmp_path / "source", {"a": [*range(50, 60), 3, 104], "b": range(60, 72)})
    job = job_of(**transfer(source_of(source), pets(tmp_path / "pets"), duplicates="allow"))
    rows = rows_of(overview_of(job))
    with_source = [row for pair, row in rows.items() if pair[0] == "source.data"]
    assert sum(row.pictures for row in with_source) == 2
    one = next(row for row in with_source if row.example[0].endswith(("010.png", "011.png")))
    assert one.example[1].endswith(("cat/003.png", "dog/004.png"))
    apart = {pair for pair in rows if pair[0] != pair[1] and pair[0] != "source.data"}
    assert apart, "without `together`, copies are on two sides of the split"
    assert apart <= {
        (f"target.data ({one})", f"target.data ({other})")
        for one, other in (("train", "pool"), ("train", "test"), ("pool", "test"))
    }


def test_pictures_are_compared_after_size_channels_and_domain(job_of, tmp_path):
    for name, shape in (("grey", (4, 4)), ("colour", (8, 8, 3))):
        for place, level in (("x", 10), ("y", 60)):
            (tmp_path / name / place).mkdir(parents=True)
            for i in range(8):
                image = np.full(shape, level + i, np.uint8)
                Image.fromarray(image).save(tmp_path / name / place / f"{i}.png")

    def shared(**options):
        grey, colour = (
            {"source": "folder", "path": str(tmp_path / name), **fields}
            for name, fields in (("grey", {}), ("colour", options))
        )
        rows = overview_of(job_of(**transfer(source_of(grey), colour))).shared
        return sum(row.pictures for row in rows)

    assert shared() == 0
    assert shared(size=4, channels=1) == 16
    assert shared(size=4, channels=1, domain={"invert": True}) == 0


def test_copies_kept_together_are_on_one_side_of_every_split_and_fold(job_of, tmp_path):
    job = job_of(**transfer(source_of({"source": "digits"}), pets(tmp_path / "pets")))
    assert job.duplicates == "together"

    def digests(part, fold=None):
        return set(load_rows(target_rows(job, job.target, repeat, part, fold=fold)).digests)

    for repeat in range(5):
        train, pool, test = map(digests, ("train", "pool", "test"))
        assert len(train | pool | test) == len(train) + len(pool) + len(test)
        for index in range(2):
            fold = FoldSpec(index=index, count=2, seed=repeat, held_out=False)
            held_out = digests("train", fold.model_copy(update={"held_out": True}))
            assert not digests("train", fold) & held_out


def test_an_episode_never_has_a_picture_in_support_and_query(job_of, tmp_path):
    data, config = pets(tmp_path / "pets"), EpisodesConfig(ways=2, shots=(2,), queries=8)
    shared = {}
    for duplicates in ("together", "allow"):
        job = job_of(**search(data, duplicates=duplicates))
        rows, shared[duplicates] = load_rows(RowsSpec(data=job.data)), 0
        for index in range(40):
            episode = draw_items(job, rows, config, 2, index)
            support = rows.subset(episode.support_S)
            assert len(support) == 4
            shared[duplicates] += len(
                set(support.digests) & set(rows.subset(episode.query_Q).digests)
            )
    assert shared["together"] == 0
    assert shared["allow"] > 0


def test_a_job_that_refuses_duplicates_names_them(job_of, tmp_path):
    data, digits = pets(tmp_path / "pets"), source_of({"source": "digits"})
    with pytest.raises(ConfigError, match=r"4 pictures more than once in target\.data.*000\.png"):
        plan_job(job_of(**transfer(digits, {**data, "size": 8, "channels": 1}, duplicates="error")))
    shared = write_folder(tmp_path / "source", {"a": [*range(50, 60), 3], "b": range(60, 72)})
    clean = pets(tmp_path / "clean", copies=False)
    with pytest.raises(ConfigError, match=r"1 picture of source\.data also in target\.data"):
        overview_of(job_of(**transfer(source_of(shared), clean, duplicates="error")))
    # Data that is not the target's may share pictures, e.g. two trainings on the same images.
    twice = write_folder(tmp_path / "twice", {"a": [1000, 1000, 1001], "b": range(2000, 2012)})
    overview_of(job_of(**transfer(source_of(twice), clean, duplicates="error")))
    with pytest.raises(ConfigError, match="more than once in data"):
        overview_of(job_of(**search(data, duplicates="error")))


def test_copies_in_two_parts_of_a_source_need_parts_that_keep_them_together(job_of, tmp_path):
    data = write_folder(
        tmp_path / "x", {name: [*range(n, n + 20)] * 2 for name, n in (("a", 0), ("b", 50))}
    )

    def job(duplicates="together", **part):
        one, two = ({**data, "part": {"index": i, "of": 2, **part}} for i in (0, 1))
        return job_of(**transfer(source_of(one), two, duplicates=duplicates))

    with pytest.raises(ConfigError, match=r"add together: true to `part` in both"):
        overview_of(job())
    assert rows_of(overview_of(job("allow"))).keys() & {("source.data", "target.data (test)")}
    shared = overview_of(job(together=True)).shared
    assert {(row.first, row.second) for row in shared} <= {
        (field, field) for field in ("source.data", "target.data")
    }


def test_the_splits_of_the_digits_are_those_of_the_published_tables():
    published = {
        "digits": "0ec1d77886cd540a",
        "digits_disjoint": "6c491657d511132d",
        "hub": "94828d56b8f61fff",
        "geometric_labels": "9ca8e34938b1202e",
    }
    found = {}
    for preset in PRESETS:
        if preset.stem not in published:
            continue
        job, digest = read_job(preset), hashlib.sha256()
        for repeat in range(2):
            for part in ("train", "pool", "test"):
                digest.update(
                    load_rows(target_rows(job, job.target, repeat, part)).images.tobytes()
                )
            fold = FoldSpec(index=1, count=4, seed=repeat, held_out=True)
            rows = load_rows(target_rows(job, job.target, repeat, "train", fold=fold))
            digest.update(rows.images.tobytes())
        found[preset.stem] = digest.hexdigest()[:16]
    assert found == published


# Where it is shown.


def test_a_new_run_says_what_it_is_given_before_ray_starts_and_a_resumed_one_does_not(
    job_of, monkeypatch
):
    def no_ray(*_):
        raise ConfigError("no Ray here")

    monkeypatch.setattr(dist_tl.jobs.run, "open_workers", no_ray)
    job = job_of(**search({"source": "digits", "classes": [5, 6], "limit": 60}))
    said = Said(), Said()
    for progress in said:
        with pytest.raises(ConfigError, match="no Ray here"):
            run_job(job, progress)
    fields = [line.partition(":")[0] for line in said[0].lines]
    assert fields == ["teacher.data", "data"]
    assert not said[1].lines


def test_a_run_with_refused_duplicates_writes_nothing(job_of, tmp_path):
    job = job_of(**search(pets(tmp_path / "pets"), duplicates="error"))
    with pytest.raises(ConfigError, match="duplicates: 4 pictures"):
        run_job(job, Said())
    assert ObjectStore(job.run).list() == []


def test_a_plan_shows_it_as_tables_and_as_json(job_of, tmp_path, monkeypatch, capsys):
    job_of(**search(pets(tmp_path / "pets")))
    for words in ((), ("--json",)):
        monkeypatch.setattr("sys.argv", ["dist-tl", "plan", str(tmp_path / "job.yaml"), *words])
        with pytest.raises(SystemExit) as leaving:
            cli.main()
        assert leaving.value.code == 0
    shown = capsys.readouterr().out
    assert "Identical pictures (duplicates: together)" in shown
    found = json.loads(shown[shown.index("\n{") :])["overview"]
    assert found["data"]["data"]["classes"] == {"cat": 23, "dog": 16}
    assert found["shared"][0]["pictures"] == 4
