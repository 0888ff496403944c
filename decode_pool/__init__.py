"""The decode craft: promise blocks before prefill starts, take the KV in, generate the tokens.

A router reserves first (`service`, in the front process): `admission` decides whether the prompt and
its likely growth fit, the `worker` allocates blocks, less what the prefix cache holds, and grants a
ticket for the rest. `kv_intake` follows the ticket; when the last piece is home and the first token
known, the sequence joins the running batch. All tokens of one step for one router travel in one message.
"""
