"""The runner: a transformers model, its weights, its KV pool and the sampler. All of it lives in one thread."""
