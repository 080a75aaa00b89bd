# syntax=docker/dockerfile:1.9
# The project in a container, and the servers of compose.yaml.
#   docker build --target project -t fast-goal:cpu .
#   docker build --target project --build-arg VARIANT=cuda -t fast-goal:cuda .     # run with --gpus all
#   docker run --rm -it -v "$PWD:/project" fast-goal:cpu dvc repro
ARG PYTHON=3.11.14-slim-bookworm
ARG VARIANT=cpu

FROM python:${PYTHON} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    GX_ANALYTICS_ENABLED=false \
    HF_HUB_DISABLE_TELEMETRY=1 \
    MLFLOW_DISABLE_TELEMETRY=true \
    PREFECT_SERVER_ANALYTICS_ENABLED=false
# the owner of what is written to a folder that is mounted: --build-arg UID="$(id -u)"
ARG UID=1000
RUN useradd --create-home --uid "${UID}" fastgoal

# MLflow and Prefect servers alone, without torch: small, and not built again when the code changes.
FROM base AS services
COPY requirements.lock /tmp/requirements.lock
# hadolint ignore=DL3013
RUN pip install --constraint /tmp/requirements.lock mlflow prefect psycopg2-binary \
    && install --directory --owner fastgoal /artifacts
USER fastgoal
WORKDIR /home/fastgoal
# HEALTH_URL is the server's own; compose.yaml sets it
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=6 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
CMD ["mlflow", "--version"]

# The wheels of the CPU are a tenth of those that bring CUDA along. What a GPU needs beside these is the driver: on the host,
# with NVIDIA's container toolkit.
FROM base AS base-cpu
ENV TORCH_INDEX=https://download.pytorch.org/whl/cpu

FROM base AS base-cuda
ENV TORCH_INDEX="" \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# hadolint ignore=DL3006
FROM base-${VARIANT} AS project
# git: DVC's; Debian keeps no old versions of it, so that one pinned here could not be had any more
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git \
    && rm -rf /var/lib/apt/lists/* \
    && git config --system --add safe.directory /project
COPY requirements.lock /tmp/requirements.lock
# The largest layer first; it stays until another torch is locked.
RUN grep -E '^(torch|torchvision)==' /tmp/requirements.lock > /tmp/torch.lock \
    && pip install ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} --requirement /tmp/torch.lock
RUN pip install --requirement /tmp/requirements.lock
WORKDIR /project
RUN chown fastgoal /project
USER fastgoal
COPY --chown=fastgoal pyproject.toml README.md ./
COPY --chown=fastgoal src src
# editable, in the place where compose.yaml mounts the project: its code counts then, not that of the image
USER root
RUN pip install --no-deps --editable .
USER fastgoal
COPY --chown=fastgoal dvc.yaml params.yaml .dvcignore ./
COPY --chown=fastgoal flows flows
CMD ["fast-goal", "--help"]
