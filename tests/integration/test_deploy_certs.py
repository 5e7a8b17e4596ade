"""What `deploy/certs.sh` makes, used as the script says: mutual TLS between a real server and real channels."""

import shutil
import subprocess
from pathlib import Path

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edge_client.transport.rpc import Endpoint, open_channel
from edge_server.config import SecurityConfig
from tests.fakes.bundles import write_tiny_bundle
from tests.fakes.server_running import running

SCRIPT = Path(__file__).parents[2] / "deploy" / "certs.sh"
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


async def status(endpoint: Endpoint) -> int | grpc.StatusCode:
    """What health answers, or how the call fails."""
    async with open_channel(endpoint) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return int(answer.status)


async def test_mutual_tls_with_the_scripts_certificates(tmp_path: Path) -> None:
    for site in ("ours", "theirs"):
        for arguments in (("ca", site), ("server", site, "edge", "localhost"), ("client", site, "camera")):
            subprocess.run([str(SCRIPT), *arguments], cwd=tmp_path, check=True, capture_output=True, timeout=30)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    security = SecurityConfig(tls_cert=ours / "edge.pem", tls_key=ours / "edge.key", tls_client_ca=ours / "ca.pem")
    bundle = write_tiny_bundle(tmp_path / "tiny")
    async with running(bundle.path, listen="localhost:0", security=security) as server:
        port = server.address.rpartition(":")[2]
        name = f"localhost:{port}"
        camera = {"tls_cert": ours / "camera.pem", "tls_key": ours / "camera.key"}
        assert await status(Endpoint(address=name, tls_ca=ours / "ca.pem", **camera)) == health_pb2.HealthCheckResponse.SERVING
        refused = {
            "no certificate": Endpoint(address=name, tls_ca=ours / "ca.pem"),
            "another site's camera": Endpoint(
                address=name, tls_ca=ours / "ca.pem", tls_cert=theirs / "camera.pem", tls_key=theirs / "camera.key"
            ),
            "a server's certificate": Endpoint(
                address=name, tls_ca=ours / "ca.pem", tls_cert=ours / "edge.pem", tls_key=ours / "edge.key"
            ),
            "another site's server": Endpoint(address=name, tls_ca=theirs / "ca.pem", **camera),
            "a name the certificate has not": Endpoint(address=f"127.0.0.1:{port}", tls_ca=ours / "ca.pem", **camera),
        }
        for case, endpoint in refused.items():
            assert await status(endpoint) is grpc.StatusCode.UNAVAILABLE, case
