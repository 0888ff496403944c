"""Who owns which KV block: reference counts, content hashes, and the order of reuse.

A block is in one of three states:

    HELD      reference count > 0; some sequence or ticket reads or writes it
    FINDABLE  reference count 0, content known by hash; reused last, least recently used first
    FREE      reference count 0, content meaningless; reused first

allocate: FREE/FINDABLE -> HELD.   forget_all: FINDABLE -> FREE.   acquire: FINDABLE/HELD -> HELD (shared).
release:  HELD -> FINDABLE if published, else FREE.   publish: makes a HELD block findable later.

One thread (the engine loop) calls everything here.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

from engine.block_log import BlockLog
from engine.errors import CapacityError, IntegrityError


class BlockPool:
    """Blocks 0 .. num_blocks-1 of one engine's KV cache."""

    def __init__(self, num_blocks: int, *, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.log: BlockLog | None = None
        """Hears which contents can be found, and which no longer."""
        self.prefix_caching = prefix_caching
        """Whether anything is ever found."""
        self._references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._findable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks nobody holds (findable ones included)."""
        return len(self._free) + len(self._findable)

    @property
    def num_findable(self) -> int:
        """Blocks nobody holds whose content can still be given out."""
        return len(self._findable)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with meaningless content; CapacityError (and nothing taken) if there are fewer."""
        if count > self.num_free:
            raise CapacityError(f"{count} KV blocks wanted, {self.num_free} of {self.num_blocks} free")
        blocks = []
        for _ in range(count):
            if self._free:
                block, _ = self._free.popitem(last=False)
            else:
                block, _ = self._findable.popitem(last=False)
                self._forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of a hash chain; nothing is taken yet."""
        found = []
        for content in hashes:
            block = self._block_of.get(content)
            if block is None:
                break
            found.append(block)
        return found

    def acquire(self, blocks: Iterable[int]) -> None:
        """Hold blocks that `find` returned."""
        for block in blocks:
            if self._references[block] == 0:
                del self._findable[block]
            self._references[block] += 1

    def publish(self, block: int, content: bytes) -> None:
        """Make a held, completely written block findable; the first block with a content wins."""
        if not self.prefix_caching or content in self._block_of or self._hash_of[block] is not None:
            return
        self._hash_of[block] = content
        self._block_of[content] = block
        if self.log is not None:
            self.log.stored(content)

    def contents(self) -> list[bytes]:
        """The hashes of all that can be found."""
        return list(self._block_of)

    def forget_all(self) -> None:
        """Give out no content of before any more: it may be as wrong as what was just found to be."""
        if self.log is not None:
            for content in self._block_of:
                self.log.evicted(content)
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks
        self._free.update(self._findable)
        self._findable.clear()

    def release(self, blocks: Sequence[int]) -> None:
        """Give back blocks, the last ones of a sequence to be reused first."""
        for block in reversed(blocks):
            if self._references[block] <= 0:
                raise IntegrityError(f"block {block} was released more often than it was taken")
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hash_of[block] is None:
                    self._free[block] = None
                    self._free.move_to_end(block, last=False)
                else:
                    self._findable[block] = None

    def check_integrity(self, holders: Iterable[Sequence[int]] | None = None) -> None:
        """Raise IntegrityError unless every block is in exactly one state.

        `holders` are the block lists of everyone who should hold some; with them the reference
        counts are compared too.
        """
        for block in range(self.num_blocks):
            places = (block in self._free) + (block in self._findable) + (self._references[block] > 0)
            if places != 1:
                raise IntegrityError(f"block {block} is in {places} states")
            content = self._hash_of[block]
            if content is not None and self._block_of.get(content) != block:
                raise IntegrityError(f"block {block} has a hash that leads elsewhere")
            if block in self._free and content is not None:
                raise IntegrityError(f"block {block} is free but has a hash")
        if len(self._block_of) != sum(1 for content in self._hash_of if content is not None):
            raise IntegrityError("a hash leads to a block that does not carry it")
        if holders is not None:
            wanted = Counter(block for blocks in holders for block in blocks)
            for block in range(self.num_blocks):
                if self._references[block] != wanted[block]:
                    raise IntegrityError(
                        f"block {block} has {self._references[block]} references, its holders are {wanted[block]}"
                    )

    def _forget(self, block: int) -> None:
        content = self._hash_of[block]
        if content is not None:
            del self._block_of[content]
            self._hash_of[block] = None
            if self.log is not None:
                self.log.evicted(content)
