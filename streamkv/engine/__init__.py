"""The engine: one task that owns scheduler, cache and runner. Seam 1 is `streamkv.engine.api`."""
