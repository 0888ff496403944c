"""The prefill craft: compute a prompt in chunks, and send each layer's KV as soon as it is written.

A router brings a request and a ticket (`service`, in the front process). In the engine process the
`worker` queues the prompt with the engine's scheduler; before each step `kv_push` hooks into the
layers, so that the KV of every chunk leaves while the next layer is still being computed. The first
token goes back to the router and, behind the last piece, to the decode worker. The prompt's blocks
are held until the receiver has settled the ticket, then stay findable for the next prompt with the
same prefix.
"""
