"""Attention backends. Each is chosen by name through the entry-point group `streamkv.backends` and imported late."""
