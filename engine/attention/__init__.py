"""Attention backends by name; `auto` picks one for the device."""
