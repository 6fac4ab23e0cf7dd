"""The cuda backend's sampling: `streamkv.fused.SamplingOps` by kernels."""

from __future__ import annotations

import torch

from streamkv.fused import LogitChanges
from streamkv_kernels.device import Device
from streamkv_kernels.sampling import Changes, Parameters, SamplingKernels

__all__ = ["CudaSampling"]


class CudaSampling:
    """See `streamkv.fused.SamplingOps`."""

    def __init__(self, device: Device, *, threads: int = 1024) -> None:
        """Nothing is compiled yet.

        Args:
            threads: of a block, which has one row.
        """
        self._kernels = SamplingKernels(device, threads=threads)

    def most_probable(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, vocab_size] -> the first of each row's largest logits; whether all of a row are finite."""
        return self._kernels.most_probable(_readable(logits))

    def change(self, logits: torch.Tensor, changes: LogitChanges) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Changed logits in float32; of those before, the most probable token, and whether all are finite."""
        changed = self._kernels.change(
            _readable(logits), Changes(changes.penalties, changes.seen, changes.bias, changes.banned, changes.allowed)
        )
        return changed.logits, changed.best, changed.finite

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        log_min_p: torch.Tensor,
        seed: torch.Tensor,
        branch: torch.Tensor,
        position: torch.Tensor,
        fallback: torch.Tensor | None,
    ) -> torch.Tensor:
        """One token per row."""
        parameters = Parameters(temperature, top_k, top_p, log_min_p, seed, branch)
        return self._kernels.sample(_readable(logits), parameters, position, fallback)

    def token_logprobs(self, logits: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one token a row its log-probability and its rank."""
        return self._kernels.token_logprobs(_readable(logits), tokens)


def _readable(logits: torch.Tensor) -> torch.Tensor:
    """As kernels read them: each row dense, float32 where it is none of the short types."""
    if logits.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        logits = logits.float()
    return logits if logits.stride(-1) == 1 else logits.contiguous()
