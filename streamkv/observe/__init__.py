"""What an operator sees of a server: metrics, the loop's lag, traces. Knows streams and steps, no socket and no HTTP."""
