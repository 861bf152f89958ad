# Container image with the `alignvlm` command, for one machine, tools/launch/tpu_pod.sh and tools/launch/jobset.yaml.
#   docker build --build-arg EXTRA=tpu -t IMAGE .
FROM python:3.11-slim AS build
WORKDIR /source
COPY setup.py pyproject.toml MANIFEST.in README.md LICENSE ./
COPY alignvlm_jax alignvlm_jax
COPY configs configs
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

FROM python:3.11-slim
# Extras in setup.py: cpu, cuda, cuda13 or tpu for the accelerator, and others after commas, such as tpu,gcs.
ARG EXTRA=cpu
WORKDIR /alignvlm
# The wheel is only mounted, so that it takes no space in the image. setup.py bounds the versions of what it needs.
# hadolint ignore=DL3013
RUN --mount=type=bind,from=build,source=/dist,target=/dist \
    pip install --no-cache-dir "$(echo /dist/*.whl)[$EXTRA]"
# Without a shell in between, signals reach alignvlm itself. It then saves and exits, for example when a Kubernetes pod
# is terminated.
ENTRYPOINT ["alignvlm"]
