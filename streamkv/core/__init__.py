"""The pure core: standard library only. No torch, no event loop, no clock, no randomness.

Reading order: `request` (a token list and one integer), `block_pool` (who owns which block), `kv_cache` (block tables,
prefix hits, copies), `scheduler` (plan and commit), `planner` (what goes into a step), `waiting` and `fairness` (whose turn
it is).
"""
