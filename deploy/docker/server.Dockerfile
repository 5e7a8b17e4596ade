# The edge: tails, the default bundles exported at build (which takes torch), so that a start writes nothing. From the repository's root:
#   docker build -f deploy/docker/server.Dockerfile -t headtail-server .
#   docker run --rm -p 127.0.0.1:50051:50051 headtail-server
# For CUDA (not tried): ONNX tails, the default models' among them, need onnxruntime-gpu in place of onnxruntime. Torch tails
# (torchvision's R-CNNs) need torch from PyPI, whose Linux wheels bring the CUDA libraries; the host has the driver and NVIDIA's
# container toolkit:
#   docker build -f deploy/docker/server.Dockerfile --build-arg TORCH_INDEX= -t headtail-server:cuda .
#   docker run --rm -p 127.0.0.1:50051:50051 --gpus all -v ./rcnn:/rcnn headtail-server:cuda --model /rcnn --tail-device cuda
ARG PYTHON=3.12
FROM python:${PYTHON}-slim-bookworm AS build
RUN python -m venv /opt/headtail
WORKDIR /src
# torch alone comes from its own index, in a layer of its own; all it needs comes from PyPI afterwards.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints.txt .
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/headtail/bin/pip install --disable-pip-version-check --no-deps ${TORCH_INDEX:+--index-url "${TORCH_INDEX}"} \
    -c constraints.txt torch
COPY . .
# EXTRAS=ray for --backend ray, EXTRAS=server,otel for traces.
ARG EXTRAS=server
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/headtail/bin/pip install --disable-pip-version-check -c constraints.txt ".[${EXTRAS}]"
ARG MODELS="efficientnet-lite0 detector"
# Readable by any user, writable by root alone.
RUN for model in ${MODELS}; do HEADTAIL_CACHE=/opt/bundles /opt/headtail/bin/splitters export "${model}" || exit 1; done \
    && chmod -R a+rX,go-w /opt/headtail /opt/bundles

FROM python:${PYTHON}-slim-bookworm
# The two NVIDIA variables matter only where its container runtime is; without it they say nothing.
ENV PATH=/opt/headtail/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HEADTAIL_CACHE=/var/lib/headtail \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build /opt/headtail /opt/headtail
COPY --from=build /opt/bundles /var/lib/headtail
USER 10001:10001
EXPOSE 50051
# Asks grpc.health.v1, as a load balancer would. A server with TLS needs --no-healthcheck, or a check that holds a certificate.
HEALTHCHECK --interval=15s --timeout=10s --start-period=120s --retries=3 CMD ["python", "-c", "\
import sys, grpc; from grpc_health.v1 import health_pb2 as pb, health_pb2_grpc as rpc; \
check = rpc.HealthStub(grpc.insecure_channel('127.0.0.1:50051')).Check; \
sys.exit(check(pb.HealthCheckRequest(), timeout=5).status != 1)"]
ENTRYPOINT ["edge-server", "--listen", "0.0.0.0:50051"]
CMD ["--model", "efficientnet-lite0", "--model", "detector"]
