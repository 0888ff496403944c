"""The two ends of a model, divided among ranks by vocabulary.

Each rank holds an equal run of rows; where the vocabulary does not divide equally the last rank's run is
padded with zero rows, and the padding's logits are cut off.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from engine.batch import Batch
from engine.layers.matrix import Matrix, make_matrix
from engine.layers.norm import RMSNorm
from engine.parallel import TensorParallel


def vocabulary_share(vocab_size: int, parallel: TensorParallel) -> range:
    """The token ids whose rows this rank holds, padding included."""
    width = -(-vocab_size // parallel.size)
    return range(parallel.rank * width, (parallel.rank + 1) * width)


def _share_of(weight: torch.Tensor, parallel: TensorParallel) -> torch.Tensor:
    """This rank's rows of a whole weight [vocab_size, hidden_size]."""
    share = vocabulary_share(weight.shape[0], parallel)
    if share.stop <= weight.shape[0]:
        return weight[share.start : share.stop]
    padded = weight.new_zeros(len(share), weight.shape[1])
    rows = weight[share.start :]
    padded[: rows.shape[0]] = rows
    return padded


class VocabParallelEmbedding:
    """Token ids to vectors."""

    def __init__(self, weight: torch.Tensor, parallel: TensorParallel) -> None:
        """`weight` is the whole embedding [vocab_size, hidden_size]."""
        self._share = vocabulary_share(weight.shape[0], parallel)
        self._parallel = parallel
        self._weight = _share_of(weight, parallel)

    def __call__(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The vectors [num_rows, hidden_size] of a step's tokens, and the tokens [num_rows] int64 themselves."""
        if self._parallel.size == 1 and self._weight.is_cuda:
            from engine.kernels.rows import embed

            return embed(batch.token_ids, batch.sources, batch.previous, self._weight)
        chosen = batch.previous[:, 0].index_select(0, batch.sources.clamp(min=0))
        token_ids = torch.where(batch.sources >= 0, chosen, batch.token_ids)
        return self._look_up(token_ids), token_ids

    def _look_up(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self._parallel.size == 1:
            return functional.embedding(token_ids, self._weight)
        local = token_ids - self._share.start
        elsewhere = (local < 0) | (local >= len(self._share))
        vectors = functional.embedding(local.masked_fill(elsewhere, 0), self._weight)
        return self._parallel.all_reduce(vectors.masked_fill_(elsewhere[:, None], 0.0))


class ParallelHead:
    """Vectors to logits over the whole vocabulary."""

    def __init__(self, weight: torch.Tensor, parallel: TensorParallel) -> None:
        """`weight` is the whole output projection [vocab_size, hidden_size] (the embedding, if tied)."""
        self._vocab_size = weight.shape[0]
        self._parallel = parallel
        self._matrix: Matrix = make_matrix(_share_of(weight, parallel))

    def __call__(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """The logits of norm(x), x [num_rows, hidden_size] -> [num_rows, vocab_size], on every rank."""
        logits = self._parallel.all_gather(self._matrix.multiply_normed(x, norm))
        return logits[:, : self._vocab_size]
