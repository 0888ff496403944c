"""Moves KV blocks between two workers: who may write where, over what, and what happens when a peer dies."""
