"""Tar encoding of samples: the bytes of webdataset's TarWriter, ten times faster.

Each member has one ustar header in which only name and size vary, so the bytes depend on the
members alone. A test compares them with the output of TarWriter, which is slow because `tarfile`
is so general.

Source: POSIX.1-1988 ustar. Not covered: anything except regular files with short names; the reader
rejects it.
"""

from collections.abc import Iterable, Iterator, Mapping

from dist_tl.errors import ShardError

BLOCK = 512
RECORD = 20 * BLOCK
MAX_MEMBER_BYTES = 1 << 28
EXTENSIONS = frozenset({"png", "jpg", "npy", "cls", "soft.npy", "json"})
OWNER = "dist_tl"
MODE = 0o444

# Fields of a header in order: name 100, mode 8, uid 8, gid 8, size 12, mtime 12, checksum 8,
# then type, link name, magic, owner, group, device numbers, prefix and padding.
_IDS = b"%07o\0" % MODE + b"%07o\0" % 0 + b"%07o\0" % 0
_MTIME = b"%011o\0" % 0
_TAIL = (
    b"0"
    + bytes(100)
    + b"ustar\x0000"
    + OWNER.encode().ljust(32, b"\0")
    + OWNER.encode().ljust(32, b"\0")
    + bytes(16 + 155 + 12)
)
_FIXED_SUM = sum(_IDS) + sum(_MTIME) + 8 * ord(" ") + sum(_TAIL)


def pack_tar(samples: Iterable[Mapping[str, str | bytes]]) -> bytes:
    """Packs samples into a tar; the members of each sample are sorted by extension.

    Args:
        samples: `__key__` and bytes by extension, the output of `sample.encode`.
    """
    parts: list[bytes] = []
    size = 0
    for sample in samples:
        key = str(sample["__key__"])
        for extension in sorted(sample.keys() - {"__key__"}):
            data = sample[extension]
            assert isinstance(data, bytes), "only __key__ is text"
            padding = -len(data) % BLOCK
            header = _header(f"{key}.{extension}".encode("ascii"), len(data))
            parts += (header, data, bytes(padding))
            size += BLOCK + len(data) + padding
    end = size + 2 * BLOCK
    parts.append(bytes(2 * BLOCK + -end % RECORD))
    return b"".join(parts)


def _header(name: bytes, size: int) -> bytes:
    if len(name) > 100 or size > MAX_MEMBER_BYTES:
        raise ValueError(f"member {name[:40]!r} of {size} bytes is too large for a shard")
    digits = b"%011o\0" % size
    checksum = _FIXED_SUM + sum(name) + sum(digits)
    return b"".join((name.ljust(100, b"\0"), _IDS, digits, _MTIME, b"%06o\0 " % checksum, _TAIL))


def walk_tar(data: bytes) -> Iterator[dict[str, str | bytes]]:
    """Yields the samples of a tar, in order: `__key__`, and bytes by extension.

    Raises:
        ShardError: truncated, or a member of an unknown kind or name, too large, or duplicate.
    """
    sample: dict[str, str | bytes] = {}
    for key, extension, member in _members(data):
        if sample and sample["__key__"] != key:
            yield sample
            sample = {}
        if extension in sample:
            raise ShardError(f"duplicate member {key}.{extension}")
        sample["__key__"] = key
        sample[extension] = member
    if sample:
        yield sample


def _members(data: bytes) -> Iterator[tuple[str, str, bytes]]:
    offset = 0
    while True:
        header = data[offset : offset + BLOCK]
        if len(header) < BLOCK:
            raise ShardError(f"the tar is truncated at byte {len(data)}: no end mark")
        if not header[0]:
            break
        key, extension, size = _parse(header)
        start = offset + BLOCK
        if start + size > len(data):
            raise ShardError(f"the tar is truncated at byte {len(data)}, inside {key}.{extension}")
        yield key, extension, data[start : start + size]
        offset = start + size + -size % BLOCK
    if data.count(0, offset) != len(data) - offset:
        raise ShardError(f"expected zeros after the end mark at byte {offset}")


def _parse(header: bytes) -> tuple[str, str, int]:
    name, _, rest = header[:100].partition(b"\0")
    digits = header[124:135]
    if header[156:157] != b"0" or header[257:262] != b"ustar" or not digits.isdigit() or any(rest):
        raise ShardError(f"member {name[:40]!r} is not a regular file")
    try:
        size = int(digits, 8)
        key, _, extension = name.decode("ascii").partition(".")
    except ValueError:
        raise ShardError(f"member {name[:40]!r} has a damaged header") from None
    if extension not in EXTENSIONS:
        raise ShardError(f"member {name[:40]!r}: expected one of {sorted(EXTENSIONS)}")
    if size > MAX_MEMBER_BYTES:
        raise ShardError(f"member {name[:40]!r} has {size} bytes; limit {MAX_MEMBER_BYTES}")
    return key, extension, size
