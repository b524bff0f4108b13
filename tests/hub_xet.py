"""Read what a client uploads by the Xet protocol: files as ranges of chunks, in containers ("xorbs") of many chunks.

The formats are those of https://huggingface.co/docs/xet: little-endian, hashes as four 64-bit numbers.
"""
import struct
from collections.abc import Iterator

ENTRY = struct.Struct("<32s4I")  # a hash and four numbers: whatever a shard holds
HEADER_SIZE = 48
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30  # flags of a file: which entries follow its ranges
BOOKEND = b"\xff" * 32


def files_of_shard(shard: bytes, xorbs: dict[str, bytes]) -> Iterator[bytes]:
    """Yield the content of each file that a shard describes, put together from the xorbs that were uploaded before."""
    entries = ENTRY.iter_unpack(shard[HEADER_SIZE:len(shard) - len(shard) % ENTRY.size])
    for file_hash, flags, count, *_ in entries:
        if file_hash == BOOKEND:
            return
        content = b""
        for _ in range(count):
            xorb_hash, _, size, start, end = next(entries)
            part = b"".join(chunks_of_xorb(xorbs[_hex(xorb_hash)])[start:end])
            assert len(part) == size
            content += part
        for _ in range(count * bool(flags & WITH_VERIFICATION) + bool(flags & WITH_SHA256)):
            next(entries)
        yield content


def chunks_of_xorb(xorb: bytes) -> list[bytes]:
    """Return the chunks of a xorb: each has a header of a version, two sizes of three bytes, and the compression."""
    chunks, position = [], 0
    while position < len(xorb) and xorb[position] == 0:  # another version: the footer, which may be left out
        size = int.from_bytes(xorb[position + 1:position + 4], "little")
        assert xorb[position + 4] == 0, "the chunk is compressed: HF_XET_XORB_COMPRESSION_POLICY must be none"
        chunks.append(xorb[position + 8:position + 8 + size])
        position += 8 + size
    return chunks


def _hex(digest: bytes) -> str:
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
