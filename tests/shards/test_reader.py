"""Reading one shard: hostile or damaged tars are rejected even if their entry is valid."""

import io
import pickle
import tarfile

import numpy as np
import pytest

from dist_tl.errors import ShardError
from dist_tl.shards.reader import decode_shard, read_shard, verify_shard
from dist_tl.shards.sample import encode
from dist_tl.shards.tar import pack_tar
from dist_tl.storage.objects import ObjectStore


class Bomb:
    executed = False

    def __reduce__(self):
        return (setattr, (Bomb, "executed", True))


@pytest.fixture
def members(stage):
    return [encode(sample) for sample in stage.samples(stage.plan().order(0))]


def verify(stage, data):
    store = ObjectStore(f"memory://reader-{id(data)}")
    stage.commit_bytes(store, stage.plan(), 0, data)
    return verify_shard(store, stage.plan(), 0)


def test_columns_match_the_samples(stage, members):
    order = stage.plan().order(0)
    soft = np.array([0.5, 0.5], np.float32)
    data = pack_tar(encode(sample) for sample in stage.samples(order, soft=soft))
    shard = decode_shard(data, stage="pp", index=0, numbers=order.numbers)
    assert shard.labels is not None
    assert shard.soft is not None
    for row, sample in enumerate(stage.samples(order, soft=soft)):
        assert shard.numbers[row] == sample.number
        np.testing.assert_array_equal(shard.images[row], sample.image)
        assert shard.labels[row] == sample.label
        np.testing.assert_array_equal(shard.soft[row], soft)
    assert shard.nbytes == 4 * (8 + 60 + 8 + 8)


def test_a_shard_without_labels_has_no_label_column(stage):
    order = stage.plan().order(0)
    data = pack_tar(encode(sample) for sample in stage.samples(order, label=None))
    shard = decode_shard(data, stage="pp", index=0, numbers=order.numbers)
    assert shard.labels is None
    assert shard.soft is None


def test_columns_are_read_only(stage, members):
    shard = decode_shard(pack_tar(members), stage="pp", index=0, numbers=range(4))
    with pytest.raises(ValueError, match="read-only"):
        shard.images[0] = 0


def test_pickles_with_other_extensions_are_rejected_and_not_executed(stage, members):
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    for name, data in [
        ("soft.npy", stream.getvalue()),
        ("npy", stream.getvalue()),
        ("json", pickle.dumps(Bomb())),
        ("cls", pickle.dumps(Bomb())),
    ]:
        changed = pack_tar([{**members[0], name: data}, *members[1:]])
        for read in (verify, read_samples):
            # Columns do not include provenance, so `verify_shard` does not decode it.
            if (read, name) != (verify, "json"):
                with pytest.raises(ShardError, match="shard 0"):
                    read(stage, changed)
    assert not Bomb.executed


def read_samples(stage, data):
    store = ObjectStore(f"memory://reader-whole-{id(data)}")
    stage.commit_bytes(store, stage.plan(), 0, data)
    return read_shard(store, "pp", 0)


@pytest.mark.parametrize("name", ["000000000000.pyd", "000000000000.pickle", "000000000000.pth"])
def test_members_that_other_readers_would_unpickle_are_rejected(stage, name):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for _ in range(8):
            info = tarfile.TarInfo(name)
            info.size = len(pickle.dumps(Bomb()))
            tar.addfile(info, io.BytesIO(pickle.dumps(Bomb())))
    with pytest.raises(ShardError, match="expected one of"):
        verify(stage, stream.getvalue())
    assert not Bomb.executed


def test_a_tar_truncated_between_members_is_rejected_even_if_the_hash_matches(stage, members):
    with pytest.raises(ShardError, match="after 3 of 4 samples"):
        verify(stage, pack_tar(members[:3]))
    with pytest.raises(ShardError, match="3 of 4 samples have a label"):
        verify(stage, pack_tar([*members[:3], {k: v for k, v in members[3].items() if k != "cls"}]))
    with pytest.raises(ShardError, match="entry says 4"):
        read_samples(stage, pack_tar(members[:3]))


def test_samples_in_the_wrong_order_are_rejected(stage, members):
    with pytest.raises(ShardError, match="not the one expected at row 0"):
        verify(stage, pack_tar(members[::-1]))
    with pytest.raises(ShardError, match="not the one expected at row 4"):
        verify(stage, pack_tar([*members, encode(stage.sample(4))]))


def test_images_of_different_sizes_in_one_shard_are_rejected(stage, members):
    stage.shape = (2, 2, 3)
    with pytest.raises(ShardError, match="the first has"):
        verify(stage, pack_tar([*members[:3], encode(stage.sample(3))]))


def test_too_many_expected_samples_are_rejected_without_allocation(members):
    with pytest.raises(ShardError, match="bytes are too few for"):
        decode_shard(pack_tar(members), stage="pp", index=0, numbers=range(10**12))


def test_an_uncommitted_shard_is_none_or_an_error(store, stage):
    assert verify_shard(store, stage.plan(), 0) is None
    with pytest.raises(ShardError, match="not committed"):
        read_shard(store, "pp", 0)
