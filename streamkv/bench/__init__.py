"""Load: seeded traffic with the statistics of public traces, sent to a running server, and what its clients felt."""
