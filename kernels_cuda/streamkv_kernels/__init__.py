"""Home of the CUDA kernels: sources, compiling and launching. They come with the CUDA backend."""
