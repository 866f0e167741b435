"""Tar encoding: equality with webdataset's writer, and hostile input."""

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from dist_tl.errors import ShardError
from dist_tl.shards.tar import BLOCK, MODE, OWNER, pack_tar, walk_tar

MEMBERS = st.dictionaries(
    st.sampled_from(["png", "npy", "cls", "soft.npy", "json"]),
    st.binary(max_size=1500),
    min_size=1,
)


def keyed(samples):
    return [{"__key__": f"{i:012d}", **members} for i, members in enumerate(samples)]


def tar_of(*members, **fields):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in fields.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@settings(max_examples=50, deadline=None)
@given(st.lists(MEMBERS, max_size=30))
def test_the_bytes_equal_those_of_webdatasets_tar_writer(samples):
    stream = io.BytesIO()
    with TarWriter(
        stream, user=OWNER, group=OWNER, mode=MODE, mtime=0, encoder=False, compress=False
    ) as writer:
        for sample in keyed(samples):
            writer.write(sample)
    assert pack_tar(keyed(samples)) == stream.getvalue()


@settings(max_examples=50, deadline=None)
@given(st.lists(MEMBERS, max_size=10))
def test_packed_samples_round_trip(samples):
    assert list(walk_tar(pack_tar(keyed(samples)))) == keyed(samples)


def test_every_truncation_is_detected():
    data = pack_tar(keyed([{"cls": b"1", "png": b"x" * 700}, {"cls": b"2"}]))
    ends = [i for i in range(0, len(data), 256) if data[i:].strip(b"\0")]
    for end in ends:
        with pytest.raises(ShardError, match="truncated"):
            list(walk_tar(data[:end]))


def test_members_of_unknown_kind_are_rejected():
    with pytest.raises(ShardError, match="expected one of"):
        list(walk_tar(tar_of(("000000000000.pyd", b"x"))))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, b"x", b"L"])
def test_special_files_are_rejected(kind):
    with pytest.raises(ShardError, match="not a regular file"):
        list(walk_tar(tar_of(("000000000000.cls", b""), type=kind)))


def test_members_above_the_size_limit_are_rejected():
    data = bytearray(tar_of(("000000000000.cls", b"1")))
    data[124:136] = b"%011o\0" % (1 << 32)
    with pytest.raises(ShardError, match="limit"):
        list(walk_tar(bytes(data)))


def test_duplicate_members_are_rejected():
    with pytest.raises(ShardError, match="duplicate"):
        list(walk_tar(tar_of(("000000000000.cls", b"1"), ("000000000000.cls", b"2"))))


def test_data_after_the_end_mark_is_rejected():
    data = pack_tar(keyed([{"cls": b"1"}]))
    with pytest.raises(ShardError, match="zeros"):
        list(walk_tar(data + data))


def test_bytes_that_are_not_a_tar_are_rejected():
    with pytest.raises(ShardError, match="not a regular file"):
        list(walk_tar(b"\x80" * BLOCK * 4))
