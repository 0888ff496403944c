"""Starts, watches and scales everything; the only place that knows Ray."""
