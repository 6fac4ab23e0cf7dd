"""StreamKV beside the engines that people would use instead: same model, same tokens, same run (docs/benchmarks-compare.md)."""
