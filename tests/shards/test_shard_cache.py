"""Caches of shards: bounded, LRU eviction, and failures that act as cache misses."""

import os

import numpy as np

from dist_tl.shards.cache import DiskCache, MemoryCache
from dist_tl.shards.reader import DecodedShard


def shard_of(num_bytes):
    numbers = np.zeros(1, np.int64)
    return DecodedShard(numbers, np.zeros((1, num_bytes - 8, 1, 1), np.uint8), None, None)


def test_memory_evicts_the_least_recently_used():
    cache = MemoryCache(300)
    for index in range(3):
        cache.put(index, shard_of(100))
    assert cache.get(0) is not None
    cache.put(3, shard_of(100))
    assert [cache.get(index) is not None for index in range(4)] == [True, False, True, True]


def test_memory_evicts_several_small_shards_for_a_large_one_and_skips_a_huge_one():
    cache = MemoryCache(300)
    for index in range(3):
        cache.put(index, shard_of(100))
    cache.put(3, shard_of(250))
    cache.put(4, shard_of(301))
    assert [cache.get(index) is not None for index in range(5)] == [False] * 3 + [True, False]


def test_a_cache_of_zero_bytes_is_always_empty():
    cache = MemoryCache(0)
    cache.put(0, shard_of(100))
    assert cache.get(0) is None


def test_disk_keeps_tars_by_hash_up_to_its_limit(tmp_path):
    cache = DiskCache(tmp_path / "cache", 250)
    for age, name in enumerate("ab"):
        cache.put(name, name.encode() * 100)
        os.utime(tmp_path / "cache" / f"{name}.tar", (age, age))
    assert cache.get("a") == b"a" * 100  # now the most recently used
    cache.put("c", b"c" * 100)
    assert [cache.get(name) is not None for name in "abc"] == [True, False, True]
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= 250


def test_a_tar_above_the_size_limit_evicts_nothing(tmp_path):
    cache = DiskCache(tmp_path, 150)
    cache.put("a", b"a" * 100)
    cache.put("b", b"b" * 151)
    assert cache.get("a") is not None
    assert cache.get("b") is None


def test_an_unusable_folder_acts_as_an_empty_cache(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = DiskCache(tmp_path / "file" / "cache", 1000)
    cache.put("a", b"a")
    assert cache.get("a") is None
    cache.drop("a")
