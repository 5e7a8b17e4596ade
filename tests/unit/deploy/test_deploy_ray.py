"""The files for Ray name what the code knows: settings, flags, applications, factories."""

import ast
import importlib.util
import shlex
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "deploy" / "ray"


def constant(module: str, name: str) -> Any:
    """A literal of a module that need not be importable here."""
    tree = ast.parse((ROOT / module).read_text(encoding="utf-8"))
    (found,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and any(getattr(t, "id", "") == name for t in n.targets))
    return ast.literal_eval(found)


SETTINGS = constant("edge_server/backends/ray/imports.py", "SETTINGS")
ARGS = constant("edge_server/backends/ray/apps.py", "_DEFAULTS")


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    (ray, door) = yaml.safe_load_all((FOLDER / "rayservice.yaml").read_text(encoding="utf-8"))
    assert (ray["apiVersion"], ray["kind"], door["kind"]) == ("ray.io/v1", "RayService", "Service")
    return {"ray": ray, "door": door}


def configs(service: dict[str, Any]) -> list[dict[str, Any]]:
    whole = yaml.safe_load((FOLDER / "serve.yaml").read_text(encoding="utf-8"))
    return [whole, yaml.safe_load(service["ray"]["spec"]["serveConfigV2"])]


def groups(service: dict[str, Any]) -> list[dict[str, Any]]:
    spec = service["ray"]["spec"]["rayClusterConfig"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_every_cluster_gets_the_settings_we_measured_with(service: dict[str, Any]) -> None:
    lines = [line for line in (FOLDER / "cluster.env").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert dict(line.split("=", 1) for line in lines) == SETTINGS | {"RAY_AUTH_MODE": "token"}
    for group in groups(service):
        (container,) = group["template"]["spec"]["containers"]
        assert {e["name"]: e["value"] for e in container["env"]} == SETTINGS


def test_applications_are_ours_and_known_to_the_door(service: dict[str, Any]) -> None:
    for config in configs(service):
        for application in config["applications"]:
            module, _, factory = application["import_path"].partition(":")
            path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
            names = [n.name for n in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(n, ast.FunctionDef)]
            assert factory in names
            assert set(application["args"]) <= set(ARGS)
            assert all(isinstance(value, str) for value in application["args"].values())
    (tails,) = configs(service)[1]["applications"]
    assert tails["name"] == f"headtail-{tails['args']['model']}"


def test_the_door_is_started_with_flags_there_are(service: dict[str, Any]) -> None:
    from edge_server.cli import build_parser, config_from

    door = next(g for g in groups(service) if g.get("groupName") == "door")
    (container,) = door["template"]["spec"]["containers"]
    line = container["args"][0].split("exec ", 1)[1]
    program, *arguments = shlex.split(line)
    assert program == "edge-server"
    config = config_from(build_parser().parse_args(arguments))
    assert (config.backend, config.ray.address) == ("ray", "auto")
    port = int(config.listen.rpartition(":")[2])
    assert {p["name"]: p["containerPort"] for p in container["ports"]} == {"headtail": port, "metrics": config.metrics_port}
    assert container["readinessProbe"]["grpc"]["port"] == port
    assert service["door"]["spec"]["ports"][0]["port"] == port
    assert service["door"]["spec"]["selector"].items() <= door["template"]["metadata"]["labels"].items()
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert config.security.token_file is not None
    assert str(config.security.token_file.parent) in mounts


def test_kuberay_leaves_every_command_to_us(service: dict[str, Any]) -> None:
    assert service["ray"]["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    for group in groups(service):
        (container,) = group["template"]["spec"]["containers"]
        assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]


def test_ray_reads_the_serve_configurations(service: dict[str, Any]) -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("Ray is not installed: pip install 'headtail[ray]'")
    schema = pytest.importorskip("ray.serve.schema")
    for config in configs(service):
        assert schema.ServeDeploySchema.model_validate(config).applications
