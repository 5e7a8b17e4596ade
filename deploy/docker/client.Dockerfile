# The device: head in ONNX Runtime, no torch. Build from the repository's root:
#   docker build -f deploy/docker/client.Dockerfile -t headtail-client .
#   docker run --rm --device /dev/video0 --group-add video -v headtail:/var/lib/headtail headtail-client --camera 0 --server edge:50051
#
# For several architectures: docker buildx build --platform linux/amd64,linux/arm64 -f deploy/docker/client.Dockerfile .
# Nothing is compiled; every dependency has wheels for both (on arm64 the range coder is our own, of the same bytes).
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build
RUN python -m venv /opt/headtail
WORKDIR /src
COPY . .
# EXTRAS=metrics for --metrics-listen, EXTRAS=metrics,otel for traces as well.
ARG EXTRAS=
# Installed as a wheel into the environment that the next stage copies; readable by any user, writable by root alone.
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/headtail/bin/pip install --disable-pip-version-check -c constraints.txt ".${EXTRAS:+[${EXTRAS}]}" \
    && chmod -R a+rX,go-w /opt/headtail

FROM python:${PYTHON}-slim-bookworm
COPY --from=build /opt/headtail /opt/headtail
RUN install -d -o 10001 -g 10001 -m 0750 /var/lib/headtail
ENV PATH=/opt/headtail/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HEADTAIL_CACHE=/var/lib/headtail
# The heads fetched from servers, kept by hash. Everything else may be mounted read-only.
VOLUME /var/lib/headtail
USER 10001:10001
# A client listens nowhere: it is healthy while it runs, and ends with a code that says why when it cannot.
HEALTHCHECK NONE
ENTRYPOINT ["edge-client"]
CMD ["--help"]
