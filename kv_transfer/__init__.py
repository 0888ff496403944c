"""Moves KV blocks between two workers: who may write where, over what, and what happens when a peer dies.

One process holds one `node.TransferNode`. Its life of one ticket: the decode side grants it
(`ledger`), the prefill side sends under it (`jobs`, then the thread of `sender`), pieces pass through
`staging` over a `transport` (`gloo`, `loopback`), and `receiver` writes what the ledger allows.
A pair of processes is made by `peers`, `control` and `handshake`, its data channel by `rendezvous`.
Start reading at `ticket`.
"""
