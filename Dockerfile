# d2m_jax and all that it needs, for hosts with NVIDIA GPUs or with TPUs.
#
#   docker build -t d2m_jax:gpu .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" d2m_jax:gpu d2m-train icons_moe_s
#
#   docker build -t d2m_jax:tpu --build-arg EXTRA=tpu .
#   docker run --rm --privileged --net=host -v "$PWD:/work" d2m_jax:tpu d2m-train icons_moe_s
#
# A GPU's host needs the driver and NVIDIA's container toolkit: CUDA itself comes with jax's wheels,
# as libtpu does.
FROM python:3.12-slim-bookworm
ARG EXTRA=gpu
WORKDIR /source
COPY pyproject.toml setup.py MANIFEST.in README.md LICENSE NOTICE ./
COPY d2m_jax d2m_jax
COPY configs configs
COPY teachers teachers
RUN pip install --no-cache-dir ".[${EXTRA}]" && rm -rf build
# What runs write is kept where it is mounted.
WORKDIR /work
ENV PYTHONUNBUFFERED=1
CMD ["d2m-train", "--help"]
