# Three images; docs/operations.md says how to use them, deploy/docker/build_and_try.py builds and tries them.
#   cpu     serves the embedded model on any x86-64 or arm64 host         docker build --target cpu -t ddetr:cpu .
#   gpu     serves on NVIDIA GPUs, with the CUDA and TensorRT plugins     docker build --target gpu -t ddetr:gpu .
#   export  checkpoints into bundles and engines: `ddetr build`           docker build --target export -t ddetr:export .
#
# Any Debian-based base will do (Python 3.11+, its own or apt's). Where pip needs settings, pass them as secrets, which stay out of
# the image: --secret id=pip.conf,src=FILE and, for a certificate named in it as /run/secrets/ca.crt, --secret id=ca.crt,src=FILE.
ARG BASE=debian:bookworm-slim
ARG GPU_BASE=nvcr.io/nvidia/tensorrt:25.10-py3

# --- cpu --------------------------------------------------------------------------------------------------------------

FROM ${BASE} AS cpu-build
COPY deploy/docker/ /opt/build/docker/
RUN sh /opt/build/docker/system.sh build \
    && python3 -m venv /opt/build/pip && python3 -m venv --without-pip /opt/ddetr
# What changes seldom comes first, and is kept from build to build.
COPY pyproject.toml /opt/build/
ENV PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    /opt/build/pip/bin/pip install -q "setuptools>=77" \
    && python3 /opt/build/docker/requirements.py < /opt/build/pyproject.toml > /opt/build/requirements.txt \
    && /opt/build/pip/bin/pip --python /opt/ddetr/bin/python install -q --no-compile -r /opt/build/requirements.txt
COPY . /opt/build/source/
# The wheel holds the native libraries. It is compiled to bytecode here: the image is read-only when it runs.
RUN cd /opt/build/source \
    && /opt/build/pip/bin/python -m pip wheel -q --no-deps --no-build-isolation -w /opt/build/wheel . \
    && /opt/build/pip/bin/pip --python /opt/ddetr/bin/python install -q --no-deps --no-index --no-compile /opt/build/wheel/*.whl \
    && cp deploy/docker/healthy.py /opt/ddetr/bin/ \
    && /opt/ddetr/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/ddetr/lib \
    && cd / && /opt/ddetr/bin/python -c "import sys, plugins; \
sys.exit(None if plugins.onnxruntime_library() and plugins.resize_library() else 'the native libraries were not built: see above')"

FROM ${BASE} AS cpu
COPY deploy/docker/system.sh /opt/
RUN sh /opt/system.sh run && rm /opt/system.sh
COPY --from=cpu-build /opt/ddetr/ /opt/ddetr/
# HOME: nothing is written there, but some libraries ask. The host's ports are bound, and guarded, outside.
ENV PATH=/opt/ddetr/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    DDETR_HOST=0.0.0.0 DDETR_METRICS_HOST=0.0.0.0
USER 65532:65532
WORKDIR /opt/ddetr
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python3", "-IS", "/opt/ddetr/bin/healthy.py"]
ENTRYPOINT ["ddetr"]
CMD ["serve"]

# --- gpu --------------------------------------------------------------------------------------------------------------

# The package's wheel, with the plugins.
FROM ${GPU_BASE} AS gpu-wheel
COPY deploy/docker/ /opt/build/docker/
# NVIDIA's images hold pip to versions of their own.
ENV PIP_CONSTRAINT="" PIP_CONFIG_FILE=/run/secrets/pip.conf PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 \
    PIP_ROOT_USER_ACTION=ignore
# TensorRT's Python package is the base's own, hence its packages are seen.
RUN sh /opt/build/docker/system.sh build \
    && python3 -m venv /opt/build/pip && python3 -m venv --without-pip --system-site-packages /opt/ddetr
# A base without TensorRT's headers: the requirement of a package that has them (kernel-lens), and nothing else of it.
ARG TENSORRT_HEADERS=""
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    /opt/build/pip/bin/pip install -q "setuptools>=77" \
    && if [ -n "$TENSORRT_HEADERS" ]; then /opt/build/pip/bin/pip install -q --no-deps "$TENSORRT_HEADERS"; fi
COPY . /opt/build/source/
RUN cd /opt/build/source \
    && /opt/build/pip/bin/python -m pip wheel --no-deps --no-build-isolation -w /opt/build/wheel . \
    && python3 -m zipfile -l /opt/build/wheel/*.whl | grep -q libmsda_tensorrt.so \
    || { echo "the plugins for CUDA and TensorRT were not built: does GPU_BASE have nvcc and TensorRT's headers?" >&2; exit 1; }

FROM gpu-wheel AS gpu-build
# A driver older than release 580: "cuda-bindings<13". A base without TensorRT's Python package: its requirement, as well.
ARG GPU_REQUIREMENTS="cuda-bindings"
# onnxruntime and onnxruntime-gpu write the same files: only one may be there.
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    python3 /opt/build/docker/requirements.py --extra gpu --without onnxruntime \
       < /opt/build/source/pyproject.toml > /opt/build/requirements.txt \
    && /opt/build/pip/bin/pip --python /opt/ddetr/bin/python install -q --ignore-installed --no-compile \
       -r /opt/build/requirements.txt $GPU_REQUIREMENTS \
    && /opt/build/pip/bin/pip --python /opt/ddetr/bin/python install -q --no-deps --no-index --no-compile /opt/build/wheel/*.whl \
    && cp /opt/build/docker/healthy.py /opt/ddetr/bin/ \
    && /opt/ddetr/bin/python -m compileall -q -j 0 --invalidation-mode unchecked-hash /opt/ddetr/lib

FROM ${GPU_BASE} AS gpu
COPY deploy/docker/system.sh /opt/
RUN sh /opt/system.sh run && rm /opt/system.sh
COPY --from=gpu-build /opt/ddetr/ /opt/ddetr/
# CUDA keeps the kernels it compiles for a new GPU under HOME; compose mounts memory there.
ENV PATH=/opt/ddetr/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    DDETR_HOST=0.0.0.0 DDETR_METRICS_HOST=0.0.0.0
USER 65532:65532
WORKDIR /opt/ddetr
EXPOSE 8000
# Engines are opened, warmed and proved before they are served (a picture a canvas, and more for DDETR_GATE_SECONDS): give them their time.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 CMD ["python3", "-IS", "/opt/ddetr/bin/healthy.py"]
ENTRYPOINT ["ddetr"]
CMD ["serve"]

# --- export -----------------------------------------------------------------------------------------------------------

FROM gpu-wheel AS export
# Add rtx for engines of GeForce and workstation GPUs, which are built without having one.
ARG EXTRAS="export gpu"
ARG GPU_REQUIREMENTS="cuda-bindings"
# The network is traced on the CPU: PyTorch's CPU build is enough, and saves gigabytes. TORCH_PIP_ARGS says where it is, as for `make setup`.
ARG TORCH="torch>=2.8,<3"
ARG TORCH_PIP_ARGS=""
# torch by itself first, so that the range in pyproject.toml is satisfied and pip looks for no other build.
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.crt \
    /opt/build/pip/bin/pip --python /opt/ddetr/bin/python install -q --ignore-installed --no-compile $TORCH_PIP_ARGS "$TORCH" \
    && python3 /opt/build/docker/requirements.py $(for extra in $EXTRAS; do echo "--extra $extra"; done) --without onnxruntime-gpu \
       < /opt/build/source/pyproject.toml > /opt/build/requirements.txt \
    && /opt/build/pip/bin/pip --python /opt/ddetr/bin/python install -q --no-compile -r /opt/build/requirements.txt $GPU_REQUIREMENTS \
    && /opt/build/pip/bin/pip --python /opt/ddetr/bin/python install -q --no-deps --no-index --no-compile /opt/build/wheel/*.whl
ENV PATH=/opt/ddetr/bin:$PATH HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
# Give it a folder that this user may write: docker run --user "$(id -u):$(id -g)" -v "$PWD":/data ...
USER 65532:65532
WORKDIR /data
ENTRYPOINT ["ddetr"]
CMD ["build", "--help"]
