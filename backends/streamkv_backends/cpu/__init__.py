"""The backend for processors: kernels in C++, compiled once for the machine they run on."""
