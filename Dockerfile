# eventkern's trainer on a machine with an NVIDIA driver. `docker compose up` builds it and trains; see compose.yaml.

FROM nvidia/cuda:13.0.2-devel-ubuntu24.04 AS build
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/eventkern
ENV PATH=/opt/eventkern/bin:$PATH
WORKDIR /source
# What changes seldom comes first, so that a change of the sources downloads nothing again.
COPY constraints.txt .
RUN pip install --no-cache-dir --constraint constraints.txt torch triton
COPY . .
RUN pip install --no-cache-dir --constraint constraints.txt ".[train,flights]"

FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04
# gcc and Python's headers: Triton and torch.compile build their launchers when a kernel is first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ libc6-dev libgomp1 python3 python3-dev \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 trainer \
    && useradd --create-home --uid 10001 --gid trainer trainer \
    && install --directory --owner trainer --group trainer /eventkern /eventkern/runs /cache
COPY --from=build /opt/eventkern /opt/eventkern
# Stores, and what compilers make, are kept between containers.
ENV PATH=/opt/eventkern/bin:$PATH \
    EVENTKERN_CACHE=/cache \
    TRITON_CACHE_DIR=/cache/triton \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /eventkern
VOLUME ["/eventkern/runs", "/cache"]
ENTRYPOINT ["eventkern"]
CMD ["train", "flights"]
