"""Names for blocks of tokens: the hash of a block covers every token before it too.

Two sequences that agree on a block's hash agree on all tokens up to its end, on the model, the type of its KV, the
block size and the tenant's salt; so either may use KV computed for the other. The hash is xxh3 with 128 bits: fast
and well mixed, but no defence against someone who searches for collisions; tenants that distrust each other need
different salts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import xxhash

HASH_BYTES = 16


def root_hash(model_hash: str, dtype: str, block_size: int, salt: str = "") -> bytes:
    """The parent of every first block."""
    digest = xxhash.xxh3_128()
    for part in (model_hash, dtype, str(block_size), salt):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return bytes(digest.digest())


def each_block_hash(token_ids: Sequence[int], block_size: int, root: bytes) -> Iterator[bytes]:
    """The hashes of the full blocks of `token_ids`, first block first; a partial last block has none."""
    pack = struct.Struct(f"<{block_size}i").pack
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = bytes(xxhash.xxh3_128_digest(parent + pack(*token_ids[start : start + block_size])))
        yield parent


def block_hashes(token_ids: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """All of them."""
    return list(each_block_hash(token_ids, block_size, root))
