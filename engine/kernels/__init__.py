"""Triton kernels of the engine: what a decode step spends its time in, and the glue between matrix products.

    attention.py    split-KV attention of one new token a sequence over the paged cache
    skinny.py       linear layers of few rows, at the memory's speed, with the norm before and the SiLU or sum behind
    rows.py         row-wise glue for any number of rows: RMSNorm, SiLU·mul, embedding, greedy choice
    rope_store.py   rotate queries and keys, store keys and values

Only imported on a GPU (or by tests, in Triton's interpreter). A function here takes tensors, checks nothing that its
caller knows, and enqueues on the current stream.
"""
