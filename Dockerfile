# The CPU service. torch from PyPI brings gigabytes of CUDA; give pip an index with CPU builds:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<index with CPU builds of torch> -t streamkv:cpu .
# For a GPU: torch from PyPI, what launches kernels, and the kernels themselves, compiled where there need be no GPU:
#   docker build --build-arg EXTRAS=gpu --build-arg CUDA_ARCHITECTURES="sm_90" -t streamkv:gpu .
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim

FROM ${PYTHON_IMAGE} AS dependencies
# pip reads them from its environment; empty ones it ignores.
ARG PIP_INDEX_URL=""
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS=""
ARG EXTRAS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv --without-pip /opt/streamkv
WORKDIR /src
COPY pyproject.toml constraints.txt ./
COPY backends/hatch_build.py backends/
# What the sources need, without the sources: they change more often, and must not make this large layer anew.
RUN touch README.md LICENSE && mkdir -p streamkv backends/streamkv_backends kernels_cuda/streamkv_kernels \
    && printf '__version__ = "0"\n' > streamkv/__init__.py \
    && touch backends/streamkv_backends/__init__.py kernels_cuda/streamkv_kernels/__init__.py \
    && python3 -m pip --python /opt/streamkv/bin/python install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}" \
    && python3 -m pip --python /opt/streamkv/bin/python uninstall --yes streamkv
# Tests, test programs and C++ headers of libraries: nothing here runs or compiles against them.
RUN cd /opt/streamkv/lib/python3*/site-packages \
    && rm -rf torch/test torch/include torch/share torch/bin/test_* torch/bin/*Test torch/bin/protoc* \
    && find . -type d -name tests -prune -exec rm -rf {} +

FROM dependencies AS wheel
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
COPY README.md LICENSE ./
COPY streamkv streamkv
COPY backends backends
COPY kernels_cuda kernels_cuda
# The kernels for processors, for every instruction set, and those for GPUs: the service has no compiler, and no folder to write to.
ARG CUDA_ARCHITECTURES=""
RUN if [ -n "$CUDA_ARCHITECTURES" ]; then \
        PYTHONPATH=.:backends:kernels_cuda /opt/streamkv/bin/python -m streamkv_kernels.variants $CUDA_ARCHITECTURES; fi
RUN STREAMKV_PREBUILD=1 python3 -m pip wheel --no-deps --wheel-dir /wheel .

FROM ${PYTHON_IMAGE}
# The cache is the place for a volume, which then belongs to the service: models of the hub are kept there.
RUN useradd --uid 10001 --create-home streamkv && install -d -o streamkv -g streamkv /home/streamkv/.cache
COPY --from=dependencies /opt/streamkv /opt/streamkv
RUN --mount=type=bind,from=wheel,source=/wheel,target=/wheel \
    python3 -m pip --python /opt/streamkv/bin/python install --no-cache-dir --no-index --no-deps --root-user-action ignore /wheel/*.whl
ENV PATH=/opt/streamkv/bin:$PATH PYTHONUNBUFFERED=1
# By number, so that whoever starts it can tell that it is not root.
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["streamkv"]
# It listens for others and therefore starts only with STREAMKV_API_KEY, or with another command line that has --api-keys.
CMD ["serve", "--host", "0.0.0.0", "--log-format", "json"]
