"""Webdataset tars: which samples are read, and invalid tars and samples."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_tl.config import StrictModel, validate
from dist_tl.datasets import tars
from dist_tl.datasets.spec import DataConfig, load_images
from dist_tl.errors import ConfigError, DataError


class Job(StrictModel):
    data: DataConfig


def load(path, **fields):
    path = [str(item) for item in path] if isinstance(path, list) else str(path)
    data = {"source": "wds", "path": path, **fields}
    return load_images(validate(Job, {"data": data}, source="job").data)


def png(level):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), level, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def samples(labels, first=0):
    for i, label in enumerate(labels, start=first):
        yield f"{i:06d}.png", png(i)
        yield f"{i:06d}.cls", str(label).encode()


def test_samples_follow_the_order_of_the_tars_and_their_members(tmp_path):
    write_tar(tmp_path / "a-1.tar", samples([0, 1], first=2))
    write_tar(tmp_path / "a-0.tar", samples([1, 2]))
    data = load(tmp_path / "a-*.tar")
    assert data.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert data.labels.tolist() == [1, 2, 0, 1]
    assert data.class_names == ("0", "1", "2")
    assert load([tmp_path / "a-1.tar", tmp_path / "a-0.tar"]).labels.tolist() == [0, 1, 1, 2]


def test_keys_end_at_the_first_dot_of_the_file_name_as_in_webdataset(tmp_path):
    members = [
        ("./v1.0/7.png", png(7)),
        ("./v1.0/7.cls", b" 0\n"),
        ("./v1.0/7.json", b"{}"),
        ("./v1.0/7.thumbnail.png", png(99)),
        ("./v1.0/8.cls", b"0"),
        ("./v1.0/8.PNG", png(8)),
        ("./README", b"hello"),
    ]
    assert load(write_tar(tmp_path / "a.tar", members)).images[:, 0, 0, 0].tolist() == [7, 8]


def test_a_classes_file_names_the_classes(tmp_path):
    write_tar(tmp_path / "a.tar", samples([1, 0, 1]))
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    data = load(tmp_path / "a.tar", classes_file=str(tmp_path / "classes.txt"), classes=["dog"])
    assert data.class_names == ("dog",)
    assert data.images[:, 0, 0, 0].tolist() == [0, 2]


def test_labels_without_names_and_classes_without_images_are_rejected(tmp_path):
    write_tar(tmp_path / "a.tar", samples([0, 3]))
    names = tmp_path / "classes.txt"
    names.write_text("a\nb\nc\n")
    with pytest.raises(DataError, match=r"000001\.cls in .* is 3, but .* names 3 classes"):
        load(tmp_path / "a.tar", classes_file=str(names))
    names.write_text("a\nb\nc\nd\n")
    with pytest.raises(DataError, match="class 'b' has no images"):
        load(tmp_path / "a.tar", classes_file=str(names))
    with pytest.raises(DataError, match="class '1' has no images"):
        load(tmp_path / "a.tar")
    assert load(tmp_path / "a.tar", classes=[3, 0]).labels.tolist() == [1, 0]


@pytest.mark.parametrize("text", ["", "a\n\nb", "a\na\n"])
def test_invalid_classes_files_are_rejected(tmp_path, text):
    write_tar(tmp_path / "a.tar", samples([0]))
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=r"classes\.txt is empty or has an empty or duplicate"):
        load(tmp_path / "a.tar", classes_file=str(tmp_path / "classes.txt"))
    with pytest.raises(ConfigError, match=r"classes_file: .* cannot be read"):
        load(tmp_path / "a.tar", classes_file=str(tmp_path / "nowhere.txt"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "no members KEY.jpg or KEY.png"),
        ([("a.json", b"{}")], "no members KEY.jpg or KEY.png"),
        ([("a.png", png(0))], r"a\.png in .* has no label a\.cls"),
        ([("a.cls", b"0")], r"a\.cls in .* has no image a\.jpg"),
        (
            [("a.png", png(0)), ("a.cls", b"cat")],
            r"a\.cls in .* contains b'cat'; expected an integer",
        ),
        ([("a.png", png(0)), ("a.cls", b"")], "expected an integer"),
        ([("a.png", png(0)), ("a.cls", b"\x80\x04K\x01.")], "expected an integer"),  # a pickle
        ([("a.png", png(0)), ("a.cls", b"-1")], "contains -1; expected a label in 0"),
        ([("a.png", png(0)), ("a.cls", b"99999999")], "contains 99999999; expected a label in 0"),
        ([("a.png", png(0)), ("a.jpg", png(0)), ("a.cls", b"0")], "share the key 'a'"),
        ([("a.png", b"damaged"), ("a.cls", b"0")], r"a\.png in .* is neither a JPEG nor a PNG"),
        ([("../a.png", png(0)), ("../a.cls", b"0")], r"unsafe name '\.\./a\.png'"),
        ([("/a.png", png(0)), ("/a.cls", b"0")], r"unsafe name '/a\.png'"),
        ([("c:\\a.png", png(0))], "unsafe name"),
    ],
)
def test_the_error_of_an_invalid_member_names_it(tmp_path, members, message):
    with pytest.raises(DataError, match=message):
        load(write_tar(tmp_path / "a.tar", members))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE]
)
def test_links_and_special_files_are_rejected(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"a\.png in .* is a link or special file"):
        load(tmp_path / "a.tar")


def test_a_member_above_the_limit_is_rejected(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", samples([0]))
    monkeypatch.setattr(tars, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match=r"000000\.png in .* bytes, more than 10"):
        load(tmp_path / "a.tar")


def test_truncated_tars_are_rejected(tmp_path):
    data = write_tar(tmp_path / "a.tar", samples([0, 1])).read_bytes()
    for length in (100, 600, 2148, 2600, 3072, 4096):
        (tmp_path / "truncated.tar").write_bytes(data[:length])
        with pytest.raises(DataError, match=r"truncated\.tar"):
            load(tmp_path / "truncated.tar")


def test_a_damaged_header_is_not_treated_as_the_end(tmp_path):
    data = bytearray(write_tar(tmp_path / "a.tar", samples([0, 1])).read_bytes())
    data[2048 : 2048 + 8] = b"\xff" * 8
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(DataError, match="truncated or damaged at byte 2048"):
        load(tmp_path / "a.tar")


def test_other_and_compressed_files_are_rejected(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"not a tar at all" * 100)
    with pytest.raises(DataError, match=r"a\.tar is not an uncompressed tar"):
        load(tmp_path / "a.tar")
    packed = gzip.compress(write_tar(tmp_path / "b.tar", samples([0])).read_bytes())
    (tmp_path / "b.tar.gz").write_bytes(packed)
    with pytest.raises(DataError, match=r"not an uncompressed tar .* decompress it"):
        load(tmp_path / "b.tar.gz")


def test_paths_that_match_nothing_or_twice_are_rejected(tmp_path):
    tar = write_tar(tmp_path / "a.tar", samples([0]))
    with pytest.raises(ConfigError, match=r"nothing matches .*none-"):
        load(tmp_path / "none-*.tar")
    with pytest.raises(ConfigError, match=r"is a folder; use its tars"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="is named twice"):
        load([tar, tmp_path / "*.tar"])
    with pytest.raises(ConfigError, match="path"):
        load([])


def test_urls_are_rejected_for_every_path():
    with pytest.raises(ConfigError, match=r"https://example\.org/b\.tar is a URL"):
        load(["a.tar", "https://example.org/b.tar"])
    with pytest.raises(ConfigError, match="s3://bucket/classes is a URL"):
        load("a.tar", classes_file="s3://bucket/classes")


def shared_cifar():
    shared = os.environ.get("DIST_TL_SHARED", Path(__file__).parents[2].parent / "shared")
    return Path(shared) / "data" / "cifar10"


@pytest.mark.skipif(
    not (shared_cifar() / "test-0000.tar").is_file(),
    reason="no CIFAR-10 tars next to the checkout; set DIST_TL_SHARED to their folder",
)
def test_200_real_images_are_read_with_20_per_class():
    folder = shared_cifar()
    classes = str(folder / "classes.txt")
    data = load(folder / "test-0000.tar", classes_file=classes, limit=200)
    assert data.images.shape == (200, 32, 32, 3)
    assert np.bincount(data.labels).tolist() == [20] * 10
    assert data.class_names[0] == "airplane"
    assert data.images.std() > 30.0


def test_an_unlabelled_pool_is_one_class_and_ignores_labels(tmp_path):
    write_tar(tmp_path / "a.tar", [("0.png", png(1)), ("1.png", png(2)), ("1.cls", b"7")])
    pool = load(tmp_path / "a.tar", unlabelled=True)
    assert pool.class_names == ("unlabelled",)
    assert pool.labels.tolist() == [0, 0]
    assert pool.images[:, 0, 0, 0].tolist() == [1, 2]
    write_tar(tmp_path / "b.tar", [("0.json", b"{}")])
    with pytest.raises(DataError, match=r"no members KEY\.jpg"):
        load(tmp_path / "b.tar", unlabelled=True)


def test_members_that_are_not_read_are_counted_by_suffix(tmp_path):
    others = [
        ("a.txt", b""),
        ("b/c.json", b""),
        ("d.json", b""),
        (".hidden", b""),
        ("LICENSE", b""),
    ]
    write_tar(tmp_path / "a.tar", [*samples([0, 1]), *others])
    expected = {".json": 2, ".txt": 1, "without suffix": 1}
    assert load(tmp_path / "a.tar").passed_over == expected
    assert load(tmp_path / "a.tar", unlabelled=True).passed_over == expected
    assert load(tmp_path / "a.tar").names[0] == f"000000.png in {tmp_path}/a.tar"
