"""The backend for NVIDIA GPUs: the CUDA kernels of kernels_cuda/, launched by CuPy, or emulated on a processor."""
