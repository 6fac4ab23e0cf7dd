# The CPU service. torch from PyPI brings gigabytes of CUDA; give pip an index with CPU builds:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<index with CPU builds of torch> -t streamkv .
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

FROM ${PYTHON_IMAGE} AS build
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/streamkv
WORKDIR /src
# Dependencies first: they change less often than the sources.
COPY pyproject.toml constraints.txt README.md LICENSE ./
RUN mkdir -p streamkv backends/streamkv_backends kernels_cuda/streamkv_kernels \
    && printf '__version__ = "0"\n' > streamkv/__init__.py \
    && touch backends/streamkv_backends/__init__.py kernels_cuda/streamkv_kernels/__init__.py \
    && /opt/streamkv/bin/python -m pip install --constraint constraints.txt . \
    && /opt/streamkv/bin/python -m pip uninstall --yes streamkv
COPY streamkv streamkv
COPY backends backends
COPY kernels_cuda kernels_cuda
RUN /opt/streamkv/bin/python -m pip install --no-deps .

FROM ${PYTHON_IMAGE}
RUN useradd --uid 10001 --create-home streamkv
COPY --from=build /opt/streamkv /opt/streamkv
ENV PATH=/opt/streamkv/bin:$PATH PYTHONUNBUFFERED=1
USER streamkv
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["streamkv"]
# It listens for others and therefore starts only with STREAMKV_API_KEY, or with another command line that has --api-keys.
CMD ["serve", "--host", "0.0.0.0", "--log-format", "json"]
