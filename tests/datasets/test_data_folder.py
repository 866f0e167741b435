"""Folders of classes: which images are read, their order, and invalid folders."""

import numpy as np
import pytest
from PIL import Image

from dist_tl.config import StrictModel, validate
from dist_tl.datasets import folder
from dist_tl.datasets.spec import DataConfig, load_images
from dist_tl.errors import ConfigError, DataError


class Job(StrictModel):
    data: DataConfig


def load(path, **fields):
    data = {"source": "folder", "path": str(path), **fields}
    return load_images(validate(Job, {"data": data}, source="job").data)


def write(path, level, shape=(4, 4, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, level, np.uint8)).save(path)


@pytest.fixture
def pets(tmp_path):
    """Three dogs and two cats, each image of one level."""
    for level, name in enumerate(["dog/b.png", "dog/a.PNG", "dog/old/c.png", "cat/1.png"]):
        write(tmp_path / name, level)
    write(tmp_path / "cat/2.jpg", 100)
    return tmp_path


def test_classes_and_files_are_sorted_by_name(pets):
    data = load(pets)
    assert data.class_names == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 1, 1, 1]
    assert data.labels.dtype == np.int64
    levels = data.images[:, 0, 0, 0].tolist()
    assert [levels[0], *levels[2:]] == [3, 1, 0, 2]
    assert abs(levels[1] - 100) <= 2  # JPEG


def test_the_order_does_not_depend_on_the_file_system(tmp_path):
    for level in np.random.default_rng(0).permutation(30):
        write(tmp_path / "a" / f"{level:02d}.png", level)
    assert load(tmp_path).images[:, 0, 0, 0].tolist() == list(range(30))


def test_hidden_files_and_other_file_types_are_skipped(pets):
    (pets / ".git").mkdir()
    (pets / "README.md").write_text("pets")
    (pets / "cat/.DS_Store").write_bytes(b"x")
    (pets / "cat/._1.png").write_bytes(b"x")
    (pets / "dog/notes.txt").write_text("x")
    data = load(pets)
    assert len(data) == 5
    assert data.passed_over == {".md": 1, ".txt": 1}
    assert load(pets, unlabelled=True).passed_over == {".md": 1, ".txt": 1}


def test_parts_keep_identical_pictures_together_if_they_say_so(tmp_path):
    for i in range(40):  # every picture twice, in other sizes than the job's
        write(tmp_path / "ab"[i // 2 % 2] / f"{i:02d}.png", i // 2, shape=(6, 6, 3))
    part = {"index": 0, "of": 2, "together": True}
    sides = [load(tmp_path, part={**part, "index": i}, size=4 - i) for i in (0, 1)]
    levels = [set(side.images[:, 0, 0, 0].tolist()) for side in sides]
    assert not levels[0] & levels[1]
    assert [len(side) for side in sides] == [20, 20]
    apart = [load(tmp_path, part={"index": i, "of": 2}).images[:, 0, 0, 0] for i in (0, 1)]
    assert set(apart[0].tolist()) & set(apart[1].tolist()), "the claim above is not empty"


def test_files_of_a_mixture_are_named_and_counted_once_for_a_folder(pets):
    (pets / "cat/film.MP4").write_bytes(b"x")
    folder = {"source": "folder", "path": str(pets)}
    mixture = {"source": "mixture", "domains": {"a": folder, "b": {**folder, "domain": {}}}}
    data = load_images(validate(Job, {"data": mixture}, source="job").data)
    assert data.passed_over == {".mp4": 1}
    assert data.names[:5] == data.names[5:]
    assert data.names[0].endswith("cat/1.png")


def test_only_selected_images_are_decoded(pets):
    (pets / "dog/d.png").write_bytes(b"damaged")
    assert len(load(pets, classes=["cat"])) == 2
    with pytest.raises(DataError, match=r"d\.png is neither"):
        load(pets)


def test_a_class_without_images_is_rejected_unless_it_is_excluded(pets):
    (pets / "bird").mkdir()
    with pytest.raises(DataError, match="class 'bird' has no images"):
        load(pets)
    assert load(pets, classes=["cat", "dog"]).class_names == ("cat", "dog")


def test_missing_empty_and_flat_folders_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match=r"expected a folder at .*nowhere, found nothing"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is empty"):
        load(tmp_path)
    write(tmp_path / "a.png", 0)
    with pytest.raises(DataError, match=r"files \(a\.png, \.\.\.\) but no sub-folders"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="found a file"):
        load(tmp_path / "a.png")


def test_the_error_of_a_truncated_image_names_it(pets):
    data = (pets / "cat/2.jpg").read_bytes()
    (pets / "cat/2.jpg").write_bytes(data[:-20])
    with pytest.raises(DataError, match=r"cat/2\.jpg cannot be decoded"):
        load(pets)


def test_the_error_of_a_file_above_the_limit_names_it(pets, monkeypatch):
    monkeypatch.setattr(folder, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"cat/1\.png is larger than 10 bytes"):
        load(pets)


def test_images_of_different_sizes_require_a_size(pets):
    write(pets / "dog/e.png", 9, shape=(6, 5, 3))
    with pytest.raises(ConfigError, match=r"4 x 4 pixels and .*e\.png has 5 x 6; add size:"):
        load(pets)
    assert load(pets, size=4).images.shape == (6, 4, 4, 3)


def test_images_of_different_channels_require_channels(pets):
    write(pets / "dog/e.png", 9, shape=(4, 4))
    with pytest.raises(ConfigError, match=r"3 channel\(s\) and .*e\.png has 1; add channels:"):
        load(pets)
    assert load(pets, channels=1).images.shape == (6, 4, 4, 1)


def test_the_error_of_a_misspelt_class_suggests_the_closest(pets):
    with pytest.raises(ConfigError, match="no class 'dogs'; did you mean 'dog'"):
        load(pets, classes=["dogs"])


def test_the_error_of_a_number_used_as_a_name_suggests_quotes(tmp_path):
    for name in ("7", "9"):
        write(tmp_path / name / "a.png", 0)
    assert load(tmp_path, classes=["9"]).class_names == ("9",)
    with pytest.raises(ConfigError, match="write '9' in quotes"):
        load(tmp_path, classes=[9])


def test_urls_are_rejected_before_anything_is_read():
    with pytest.raises(ConfigError, match=r"s3://bucket/pets is a URL.*mount.*or copy"):
        load("s3://bucket/pets")


def test_an_unlabelled_pool_requires_no_class_folders(tmp_path):
    write(tmp_path / "b.png", 2)
    write(tmp_path / "deep" / "a.png", 1)
    pool = load(tmp_path, unlabelled=True)
    assert pool.class_names == ("unlabelled",)
    assert pool.images[:, 0, 0, 0].tolist() == [2, 1]
    assert pool.labels.tolist() == [0, 0]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        load(tmp_path / "empty", unlabelled=True)
    with pytest.raises(ConfigError, match="expected a folder"):
        load(tmp_path / "nowhere", unlabelled=True)
