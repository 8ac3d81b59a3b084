# Everything that trains, for HTCondor, Slurm and Apptainer, on processors and GPUs:
#
#   docker build -f deployment/docker/train.Dockerfile --build-arg COMMIT="$(git rev-parse HEAD)" -t marten-train .
#   docker run --rm -v "$PWD:/job" -w /job --user "$(id -u):$(id -g)" marten-train \
#       python3 /app/train_main.py --conv_net vgg --data_dir data --model_path out/model_vgg.pth
#
#   condor_submit image=docker://me/marten-train:1.0 data=train.zip deployment/htcondor/train.sub
#   apptainer build marten-train.sif docker-daemon://marten-train:latest
#   apptainer exec --nv marten-train.sif bash /app/deployment/job.sh --conv_net vgg --data_dir data …
#
# The program lies in /app and is only read; what a run writes goes where --model_path says. There is no ENTRYPOINT: a
# scheduler brings its own command. A tag never changes what it means: give each build its own.

# as in serve.Dockerfile, and renewed with it
ARG BASE_IMAGE=python:3.11.16-slim-bookworm@sha256:a36c24f9cbdf4fd0f52d67f0823eeac19c2028c637cecc392d97f980d4fec56b

FROM ${BASE_IMAGE}
ARG TORCH_INDEX=""
ARG PACKAGES="-r /tmp/pins/requirements.txt"
COPY requirements*.txt deployment/docker/constraints.txt /tmp/pins/
RUN pip install --no-cache-dir --only-binary :all: ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} \
        -c /tmp/pins/requirements.txt -c /tmp/pins/constraints.txt \
        ${PACKAGES} \
    && rm -r /tmp/pins

WORKDIR /app
COPY *.py ./
COPY handlers handlers
COPY models models
COPY deep_cnn deep_cnn
COPY marten marten
COPY scripts scripts
COPY deployment/*.sh deployment/*.yaml deployment/
RUN python3 -m compileall -q .

# Apptainer and HTCondor run it as whoever submitted the job, with or without a home
ENV HOME=/tmp \
    PYTHONUNBUFFERED=1 \
    MARTEN_HOME=/app \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# last, because it differs with every build: the commit that the model's card will tell
ARG COMMIT=unknown
ENV MARTEN_COMMIT=${COMMIT}
LABEL org.opencontainers.image.title="marten-train" \
      org.opencontainers.image.description="Trains image classifiers under schedulers" \
      org.opencontainers.image.revision="${COMMIT}" \
      org.opencontainers.image.licenses="BSD-3-Clause"
USER 1000:1000
CMD ["python3", "/app/train_main.py", "--help"]
