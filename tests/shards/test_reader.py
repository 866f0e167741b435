"""Reading one shard: hostile or broken tars that carry a valid entry are still refused."""

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
    exploded = False

    def __reduce__(self):
        return (setattr, (Bomb, "exploded", True))


@pytest.fixture
def members(stage):
    return [encode(sample) for sample in stage.samples(stage.plan().order(0))]


def verified(stage, data):
    store = ObjectStore(f"memory://reader-{id(data)}")
    stage.commit_bytes(store, stage.plan(), 0, data)
    return verify_shard(store, stage.plan(), 0)


def test_columns_agree_with_samples(stage, members):
    order = stage.plan().order(0)
    soft = np.array([0.5, 0.5], np.float32)
    data = pack_tar(encode(sample) for sample in stage.samples(order, soft=soft))
    shard = decode_shard(data, stage="pp", index=0, numbers=order.numbers)
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


def test_columns_cannot_be_written_to(stage, members):
    shard = decode_shard(pack_tar(members), stage="pp", index=0, numbers=range(4))
    with pytest.raises(ValueError, match="read-only"):
        shard.images[0] = 0


def test_a_pickle_under_an_innocent_name_is_refused_and_not_run(stage, members):
    stream = io.BytesIO()
    np.save(stream, np.array([Bomb()], dtype=object), allow_pickle=True)
    for name, data in [
        ("soft.npy", stream.getvalue()),
        ("npy", stream.getvalue()),
        ("json", pickle.dumps(Bomb())),
        ("cls", pickle.dumps(Bomb())),
    ]:
        changed = pack_tar([{**members[0], name: data}, *members[1:]])
        for read in (verified, read_shard_of):
            # The columns of a batch leave provenance alone; whoever shows it refuses it.
            if (read, name) != (verified, "json"):
                with pytest.raises(ShardError, match="shard 0"):
                    read(stage, changed)
    assert not Bomb.exploded


def read_shard_of(stage, data):
    store = ObjectStore(f"memory://reader-whole-{id(data)}")
    stage.commit_bytes(store, stage.plan(), 0, data)
    return read_shard(store, "pp", 0)


@pytest.mark.parametrize("name", ["000000000000.pyd", "000000000000.pickle", "000000000000.pth"])
def test_members_that_other_readers_would_unpickle_are_refused(stage, name):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for _ in range(8):
            info = tarfile.TarInfo(name)
            info.size = len(pickle.dumps(Bomb()))
            tar.addfile(info, io.BytesIO(pickle.dumps(Bomb())))
    with pytest.raises(ShardError, match="expected one of"):
        verified(stage, stream.getvalue())
    assert not Bomb.exploded


def test_a_tar_cut_at_a_member_boundary_is_noticed_even_with_a_matching_hash(stage, members):
    with pytest.raises(ShardError, match="after 3 of 4 samples"):
        verified(stage, pack_tar(members[:3]))
    with pytest.raises(ShardError, match="3 of 4 samples have a label"):
        verified(
            stage, pack_tar([*members[:3], {k: v for k, v in members[3].items() if k != "cls"}])
        )
    with pytest.raises(ShardError, match="entry says 4"):
        read_shard_of(stage, pack_tar(members[:3]))


def test_samples_that_were_not_ordered_are_refused(stage, members):
    with pytest.raises(ShardError, match="not the one expected at row 0"):
        verified(stage, pack_tar(members[::-1]))
    with pytest.raises(ShardError, match="not the one expected at row 4"):
        verified(stage, pack_tar([*members, encode(stage.sample(4))]))


def test_images_of_two_sizes_in_one_shard_are_refused(stage, members):
    stage.shape = (2, 2, 3)
    with pytest.raises(ShardError, match="the first has"):
        verified(stage, pack_tar([*members[:3], encode(stage.sample(3))]))


def test_an_entry_that_promises_more_than_its_tar_can_hold_allocates_nothing(members):
    with pytest.raises(ShardError, match="cannot hold"):
        decode_shard(pack_tar(members), stage="pp", index=0, numbers=range(10**12))


def test_a_shard_that_is_not_there_is_said_to_be_so(store, stage):
    assert verify_shard(store, stage.plan(), 0) is None
    with pytest.raises(ShardError, match="not committed"):
        read_shard(store, "pp", 0)
