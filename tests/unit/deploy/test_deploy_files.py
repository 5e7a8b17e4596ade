"""The deployment files against what exists: every flag, port, model, metric, label and path they name is looked up in the code."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import edge_client.cli
import edge_client.observe.metrics
import edge_server.cli
from edge_client.frames import CapturedFrame, FrameReport, Outcome
from edge_client.observe.summary import STAGES
from edge_server.config import ServerConfig, is_loopback, split_address
from edge_server.observe.metrics import PrometheusMetrics
from protos.errors import BY_CODE, LimitError
from protos.messages import Answer, Classification, ClassScore, Result, ServerTimings
from splitters.zoo.defaults import EXPORTERS

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy"
BASE = DEPLOY / "kubernetes" / "base"
YAML_FILES = sorted([*DEPLOY.rglob("*.yaml"), *(ROOT / ".github").rglob("*.yml")])
assert len(YAML_FILES) > 10


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def server_config(arguments: list[str]) -> ServerConfig:
    """The arguments through the real parser and all its checks; an unknown flag or a bad value ends the test."""
    args = edge_server.cli.build_parser().parse_args(arguments)
    return edge_server.cli.config_from(edge_server.cli.with_file(args, arguments) if args.config else args)


# ------------------------------------------------------------------------------------------------ all files


@pytest.mark.parametrize("path", YAML_FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_yaml_parses(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert documents
    assert all(isinstance(document, dict) for document in documents)


def commented_commands() -> Iterator[tuple[str, str, str]]:
    """Flags of our commands on lines that name them: comments, unit files, the security page."""
    rooms = ("compose", "docker", "kubernetes", "systemd", "prometheus", "grafana")
    files = [p for room in rooms for p in sorted((DEPLOY / room).rglob("*")) if p.is_file()]
    for path in [*files, DEPLOY / "compose.yaml", DEPLOY / "certs.sh", ROOT / ".github" / "SECURITY.md"]:
        for line in path.read_text(encoding="utf-8").splitlines():
            for command in ("edge-client", "edge-server"):
                if re.search(rf"(?<![\w-]){command}(?= -)", line):
                    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", line.split(command, 1)[1]):
                        yield str(path.relative_to(ROOT)), command, flag


def test_flags_in_examples_exist() -> None:
    known = {
        "edge-client": set(edge_client.cli.build_parser()._option_string_actions),
        "edge-server": set(edge_server.cli.build_parser()._option_string_actions),
    }
    found = list(commented_commands())
    assert len(found) >= 7
    assert [f for f in found if f[2] not in known[f[1]]] == []


# ------------------------------------------------------------------------------------------------ images


class Dockerfile:
    """As much of a Dockerfile as these tests ask for; the last stage's settings win."""

    def __init__(self, path: Path) -> None:
        text = re.sub(r"^\s*#.*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        text = re.sub(r"\\\n", "", text)
        self.lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]

    def all(self, instruction: str) -> list[str]:
        return [rest.strip() for name, rest in self.lines if name == instruction]

    def last_json(self, instruction: str) -> list[str]:
        value = json.loads(self.all(instruction)[-1])
        assert isinstance(value, list)
        return value


CLIENT_IMAGE = Dockerfile(DEPLOY / "docker" / "client.Dockerfile")
SERVER_IMAGE = Dockerfile(DEPLOY / "docker" / "server.Dockerfile")


def test_server_image_starts_with_what_it_holds() -> None:
    entry = SERVER_IMAGE.last_json("ENTRYPOINT")
    assert entry[0] in project()["scripts"]
    config = server_config([*entry[1:], *SERVER_IMAGE.last_json("CMD")])
    host, port = split_address(config.listen)
    assert not is_loopback(host)
    assert SERVER_IMAGE.all("EXPOSE") == [str(port)]
    exported = dict(a.split("=", 1) for a in SERVER_IMAGE.all("ARG") if "=" in a)["MODELS"].strip('"').split()
    assert set(config.models) == set(exported) <= set(EXPORTERS)
    assert f":{port}'" in SERVER_IMAGE.all("HEALTHCHECK")[-1]


def test_health_check_compiles() -> None:
    check = json.loads(SERVER_IMAGE.all("HEALTHCHECK")[-1].split("CMD", 1)[1])
    assert check[:2] == ["python", "-c"]
    compile(check[2], "HEALTHCHECK", "exec")


@pytest.mark.parametrize("image", [CLIENT_IMAGE, SERVER_IMAGE], ids=["client", "server"])
def test_images_are_not_root_and_install_what_is_declared(image: Dockerfile) -> None:
    uid = image.all("USER")[-1].split(":")[0]
    assert int(uid) > 0
    installs = " ".join(image.all("RUN"))
    arguments = dict(a.split("=", 1) for a in image.all("ARG") if "=" in a)
    for extra in re.findall(r"\.\[\$\{(\w+)\}\]", installs):
        assert arguments[extra] in project()["optional-dependencies"]
    assert "-c constraints.txt" in installs
    assert image.last_json("ENTRYPOINT")[0] in project()["scripts"]


def test_client_image_installs_no_extra_unless_asked() -> None:
    assert ".[" not in " ".join(CLIENT_IMAGE.all("RUN"))
    assert "EXTRAS=" in CLIENT_IMAGE.all("ARG")  # empty; compose asks for the metrics
    asked = COMPOSE["services"]["client"]["build"]["args"]["EXTRAS"].split(",")
    assert set(asked) <= set(project()["optional-dependencies"]) - {"server", "ray", "train", "zoo", "demo", "dev"}
    assert not any("torch" in dependency for dependency in project()["dependencies"])


def project() -> dict[str, Any]:
    found: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return found


def test_docker_context_holds_what_is_installed_and_no_more() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*", "everything is left out unless it is named"
    admitted = [line[1:] for line in lines if line.startswith("!")]
    assert all((ROOT / name).exists() for name in admitted)
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    needed = {"pyproject.toml", "constraints.txt", project()["readme"], *project()["license-files"]}
    for package in packages:
        top = package.replace(".", "/").rstrip("*")
        needed.add("deploy/__init__.py" if top == "deploy" else top)
    assert needed == set(admitted)
    assert not any(fnmatch(secret, name) for name in admitted for secret in (".git", ".env", "build", "tests", "deploy"))


# ------------------------------------------------------------------------------------------------ compose


def interpolated(text: str) -> str:
    """``${NAME:-default}`` as compose reads it with nothing set."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


COMPOSE = load(DEPLOY / "compose.yaml")


@pytest.fixture
def web_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `compose.yaml` demands of whoever starts it."""
    monkeypatch.setenv("HEADTAIL_WEB_TOKEN", "correct-horse-battery")


def client_arguments() -> list[str]:
    """The client's command in `compose.yaml`, its file where it lies here."""
    service = COMPOSE["services"]["client"]
    mounted = {v.split(":")[1]: v.split(":")[0] for v in map(interpolated, service["volumes"])}
    arguments = [interpolated(a) for a in service["command"]]
    (config,) = [a for a in arguments if a.startswith("--config=")]
    return [a if a != config else f"--config={DEPLOY / mounted[config.partition('=')[2]]}" for a in arguments]


@pytest.mark.usefixtures("web_token")
def test_compose_commands_parse() -> None:
    services = COMPOSE["services"]
    config = server_config([*SERVER_IMAGE.last_json("ENTRYPOINT")[1:], *services["server"]["command"]])
    assert set(config.models) <= set(EXPORTERS)
    client, *_ = edge_client.cli.parse(client_arguments())
    assert client.server == f"server:{split_address(config.listen)[1]}"
    assert client.model in config.models
    grace_s = int(services["server"]["stop_grace_period"].rstrip("s"))
    assert grace_s > config.grace_s
    for service, page, extras in ((services["server"], config.web, "web"), (services["client"], client.web, "web,events,metrics")):
        assert page is not None
        port = page.rpartition(":")[2]
        assert f"127.0.0.1:{port}:{port}" in service["ports"]
        assert "HEADTAIL_WEB_TOKEN" in service["environment"]
        assert set(extras.split(",")) <= set(service["build"]["args"]["EXTRAS"].split(","))


@pytest.mark.usefixtures("web_token")
def test_the_clients_events_reach_the_broker_and_the_listener_hears_them() -> None:
    services = COMPOSE["services"]
    client, *_ = edge_client.cli.parse(client_arguments())
    (rule,) = client.events
    host, port = rule.to.removeprefix("mqtt://").split(":")
    conf = (DEPLOY / "compose" / "mosquitto.conf").read_text().splitlines()
    assert f"listener {port}" in conf
    for name in ("client", "listener"):
        assert set(services[name]["networks"]) & set(services[host]["networks"])
    assert "ports" not in services[host], "a broker without a password is not for other machines"
    listener = services["listener"]["command"]
    assert listener[listener.index("-h") + 1] == host
    assert f"{rule.prefix}/#" in listener
    assert rule.discovery
    assert "homeassistant/#" in listener


def test_what_a_service_logs_is_rotated() -> None:
    for service in COMPOSE["services"].values():
        assert {"max-size", "max-file"} <= set(service["logging"]["options"])


def test_compose_is_wired() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        if "build" in service:
            context = (DEPLOY / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).is_file()
        for volume in service.get("volumes", []):
            source = interpolated(volume).split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]
        assert set(service["networks"]) <= set(COMPOSE["networks"])
        assert set(service.get("depends_on", [])) <= set(services)
        for port in service.get("ports", []):
            assert interpolated(port).startswith("127.0.0.1:"), "nothing is open to other machines unless asked for"
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]


@pytest.mark.usefixtures("web_token")
def test_prometheus_scrapes_both_sides_metrics() -> None:
    config = load(DEPLOY / "prometheus" / "prometheus.yaml")
    server = COMPOSE["services"]["server"]
    port = server_config(server["command"]).metrics_port
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in config["scrape_configs"]}
    client = COMPOSE["services"]["client"]
    config_of_client, *_ = edge_client.cli.parse(client_arguments())
    client_port = config_of_client.metrics_address()[1]
    assert targets == {"headtail-server": [f"server:{port}"], "headtail-client": [f"client:{client_port}"]}
    assert "metrics" in client["build"]["args"]["EXTRAS"].split(",")
    for service in (server, client):
        assert set(COMPOSE["services"]["prometheus"]["networks"]) & set(service["networks"])
    assert all((DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"])
    mounted = dict(v.split(":")[:2] for v in COMPOSE["services"]["prometheus"]["volumes"])["./prometheus"]
    assert f"--config.file={mounted}/prometheus.yaml" in COMPOSE["services"]["prometheus"]["command"]


# ------------------------------------------------------------------------------------------------ metrics


def exported() -> dict[str, set[str]]:
    """Every series the server exports, with its labels, read off a real registry after one event of each kind."""
    metrics = PrometheusMetrics()
    timings = ServerTimings(decode_ns=1, queue_ns=1, tail_ns=1, total_ns=3, batch_size=1)
    answer: Answer = Classification(top=(ClassScore(class_id=0, score=1.0),))
    metrics.on_session("m", +1)
    metrics.on_result("m", Result(frame_id=1, answer=answer, timings=timings), 1)
    metrics.on_result("m", Result(frame_id=2, error=LimitError("too many")), 1)
    metrics.on_grant()
    metrics.on_refused("limit")
    device = edge_client.observe.metrics.Metrics(SimpleNamespace(up=True, reconnects=0))
    frame = CapturedFrame(index=0, image=None, captured_ns=0, captured_unix_ns=0, width_px=1, height_px=1)
    report = FrameReport(frame=frame, model="m", bundle_sha256="", outcome=Outcome.RESULT, stages_ms=dict.fromkeys(STAGES, 1.0))
    device.take(report)
    found: dict[str, set[str]] = {}
    for family in (*metrics.registry.collect(), *device.registry.collect()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(f"{k}={v}" for k, v in sample.labels.items())
    return found


SERIES = exported()
SCRAPED = {"instance", "job"}  # Prometheus adds these
WORDS = {"sum", "rate", "by", "histogram_quantile", "count", "max", "avg", "increase", "le", "and", "or", "on"}


def check_query(query: str) -> None:
    """Every series, label and fixed label value of a PromQL expression is one the server exports."""
    labels = {pair.split("=")[0] for pairs in SERIES.values() for pair in pairs} | SCRAPED
    for name, matchers in re.findall(r"([a-z_]+)\{([^}]*)\}", query):
        if name == "up":
            continue
        assert name in SERIES, f"{name} is not exported: {query}"
        own = {pair.split("=")[0] for pair in SERIES[name]}
        for label, operator, value in re.findall(r'(\w+)(=~|!=|!~|=)"([^"]*)"', matchers):
            assert label in own | SCRAPED, f"{name} has no label {label}: {query}"
            if operator in ("=", "!=") and label not in SCRAPED and label != "outcome":
                assert f"{label}={value}" in SERIES[name], f"{name} never has {label}={value}: {query}"
            if label == "outcome":
                assert value == "result" or value in BY_CODE, query
    for group in re.findall(r"by \(([^)]*)\)", query):
        assert {g.strip() for g in group.split(",")} <= labels | {"le"}, query
    bare = re.sub(r"by \([^)]*\)|\{[^}]*\}|\[[^\]]*\]|\$\w+", " ", query)
    for name in re.findall(r"[a-z_]{2,}", bare):
        assert name in SERIES or name in WORDS or name == "up", f"{name} is not exported: {query}"


def test_check_query_refuses_what_is_not_exported() -> None:
    check_query('sum by (model) (rate(headtail_frames_total{outcome="result"}[5m]))')
    for wrong in (
        "sum(rate(headtail_frame_total[5m]))",
        'headtail_frames_total{result="ok"}',
        'headtail_stage_seconds_sum{stage="network"}',
        "sum by (camera) (headtail_sessions)",
        'headtail_frames_total{outcome="bored"}',
    ):
        with pytest.raises(AssertionError):
            check_query(wrong)


def test_dashboard_asks_only_for_what_is_exported() -> None:
    dashboard = json.loads((DEPLOY / "grafana" / "dashboards" / "headtail.json").read_text(encoding="utf-8"))
    source = load(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"][0]
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) > 10
    queries = [(panel, target) for panel in panels for target in panel["targets"]]
    for panel, target in queries:
        assert panel["datasource"]["uid"] == target["datasource"]["uid"] == source["uid"]
        check_query(target["expr"])
        shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        grouped = {g.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for g in group.split(",")}
        assert shown <= grouped, f"{panel['title']}: the legend shows what the query drops"
    for variable in dashboard["templating"]["list"]:
        series, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]).groups()
        assert any(pair.startswith(f"{label}=") for pair in SERIES[series])
    cells = [
        (x, y)
        for p in panels
        for g in [p["gridPos"]]
        for x in range(g["x"], g["x"] + g["w"])
        for y in range(g["y"], g["y"] + g["h"])
    ]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert max(x for x, _ in cells) < 24


def test_dashboard_lies_where_it_is_looked_for() -> None:
    grafana = COMPOSE["services"]["grafana"]
    mounts = {target: source for source, target, *_ in (v.split(":") for v in grafana["volumes"])}
    provider = load(DEPLOY / "grafana" / "provisioning" / "dashboards" / "headtail.yaml")["providers"][0]
    assert (DEPLOY / mounts[provider["options"]["path"]] / "headtail.json").is_file()
    home = grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert home == f"{provider['options']['path']}/headtail.json"
    source = load(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"


def test_alerts_ask_only_for_what_is_exported() -> None:
    rules = [rule for group in load(DEPLOY / "prometheus" / "alerts.yaml")["groups"] for rule in group["rules"]]
    for rule in rules:
        check_query(rule["expr"])
        assert {"summary", "description"} <= set(rule["annotations"])
    tested = (DEPLOY / "prometheus" / "alerts_test.yaml").read_text()
    assert all(rule["alert"] in tested for rule in rules)


def test_alerts_fire() -> None:
    promtool = shutil.which("promtool") or shutil.which(DEPLOY.parent / ".venvs" / "promtool" / "usr" / "bin" / "promtool")
    if promtool is None:
        pytest.skip("promtool is neither on PATH nor in .venvs/promtool, where make test puts it")
    subprocess.run([promtool, "test", "rules", "alerts_test.yaml"], cwd=DEPLOY / "prometheus", check=True, timeout=60)


# ------------------------------------------------------------------------------------------------ Kubernetes


def objects(folder: Path) -> dict[str, Any]:
    """The resources of a kustomization by kind, its JSON patches applied (`add` to lists, `replace`, `remove`)."""
    kustomization = load(folder / "kustomization.yaml")
    found: dict[str, Any] = {}
    for name in kustomization["resources"]:
        if (folder / name).is_dir():
            found |= objects((folder / name).resolve())
        else:
            found |= {each["kind"]: each for each in yaml.safe_load_all((folder / name).read_text())}
    for entry in kustomization.get("patches", []):
        for step in yaml.safe_load(entry["patch"]):
            *parents, last = step["path"].strip("/").split("/")
            node = found[entry["target"]["kind"]]
            for part in parents:
                node = node[int(part)] if isinstance(node, list) else node[part]
            if step["op"] == "add" and last == "-":
                node.append(step["value"])
            elif step["op"] == "replace":
                assert last in node
                node[last] = step["value"]
            else:
                assert step["op"] == "remove"
                del node[last]
    return found


@pytest.mark.parametrize("variant", ["base", "tls"])
def test_kubernetes_runs_what_exists(variant: str) -> None:
    found = objects(DEPLOY / "kubernetes" / variant)
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    config = server_config([*SERVER_IMAGE.last_json("ENTRYPOINT")[1:], *container["args"]])
    grpc_port = split_address(config.listen)[1]
    ports = {p["name"]: p["containerPort"] for p in container["ports"]}
    assert ports == {"grpc": grpc_port, "metrics": config.metrics_port}
    assert set(config.models) <= set(EXPORTERS)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if config.security.tls_cert:  # Kubernetes' gRPC probes speak no TLS
            assert container[probe]["tcpSocket"]["port"] == "grpc"
        else:
            assert container[probe]["grpc"]["port"] == grpc_port
    (port,) = found["Service"]["spec"]["ports"]
    assert port["targetPort"] in ports
    assert port["port"] == grpc_port
    assert (variant == "tls") == (config.security.tls_client_ca is not None)
    assert config.security.token_file is not None
    mounts = {m["mountPath"] for m in container["volumeMounts"]}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    for file in (config.security.token_file, config.security.tls_cert, config.security.tls_key, config.security.tls_client_ca):
        assert file is None or str(file.parent) in mounts
    pause_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > pause_s + config.grace_s


def test_kubernetes_objects_belong_together() -> None:
    found = objects(BASE)
    deployment = found["Deployment"]
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"].items()
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert found["Service"]["spec"]["selector"].items() <= labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"].items() <= labels
    assert found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items() <= labels
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"], "they are the autoscaler's"
    assert pod["spec"]["serviceAccountName"] == found["ServiceAccount"]["metadata"]["name"]
    ports = {p["containerPort"] for c in pod["spec"]["containers"] for p in c["ports"]}
    rules = found["NetworkPolicy"]["spec"]["ingress"]
    assert {p["port"] for rule in rules for p in rule["ports"]} == ports
    assert all("from" in rule for rule in rules if {p["port"] for p in rule["ports"]} == {9464}), "metrics are not for everyone"


def test_kubernetes_pod_has_least_privilege() -> None:
    pod = objects(BASE)["Deployment"]["spec"]["template"]["spec"]
    uid = int(SERVER_IMAGE.all("USER")[-1].split(":")[0])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] == uid
    assert pod["automountServiceAccountToken"] is False
    for container in pod["containers"]:
        context = container["securityContext"]
        assert context["readOnlyRootFilesystem"] is True
        assert context["allowPrivilegeEscalation"] is False
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert "memory" in container["resources"]["limits"]


# ------------------------------------------------------------------------------------------------ systemd, certificates, CI

UNIT = DEPLOY / "systemd" / "headtail-client.service"
SERVER_UNIT = DEPLOY / "systemd" / "headtail-server.service"


def test_unit_starts_the_client_with_its_sample_settings(tmp_path: Path) -> None:
    lines = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if "=" in line and not line.startswith("#"))
    command, *arguments = lines["ExecStart"].split()
    assert Path(command).name in project()["scripts"]
    sample = (DEPLOY / "systemd" / "client.toml").read_text()
    everything = re.sub(r"^# (?=\w+ = )", "", sample, flags=re.MULTILINE)
    for text in (sample, everything):
        (tmp_path / "client.toml").write_text(text)
        given = [str(tmp_path / "client.toml") if a == "/etc/headtail/client.toml" else a for a in arguments]
        config, *_ = edge_client.cli.parse(given)
        assert config.camera.startswith("/dev/video")
    assert set(map(int, lines["RestartPreventExitStatus"].split())) <= {0, *(error.exit_code for error in BY_CODE.values())}


def test_unit_starts_the_server_with_its_sample_settings(tmp_path: Path) -> None:
    text = SERVER_UNIT.read_text()
    lines = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and not line.startswith("#"))
    command, *arguments = lines["ExecStart"].split()
    assert Path(command).name in project()["scripts"]
    sample = (DEPLOY / "systemd" / "server.toml").read_text()
    everything = re.sub(r"^# (?=\w+ = )", "", sample, flags=re.MULTILINE)
    handed_over = {
        f"/run/credentials/{SERVER_UNIT.name}/{name}" for name in re.findall(r"^LoadCredential=(\S+?):", text, re.MULTILINE)
    }
    for settings in (sample, everything):
        (tmp_path / "server.toml").write_text(settings)
        given = [str(tmp_path / "server.toml") if a == "/etc/headtail/server.toml" else a for a in arguments]
        config = server_config(given)
        assert set(config.models) <= set(EXPORTERS)
        assert {str(config.security.tls_cert), str(config.security.tls_key), str(config.security.token_file)} == handed_over
        assert int(lines["TimeoutStopSec"]) > config.grace_s
    assert set(map(int, lines["RestartPreventExitStatus"].split())) <= {0, *(error.exit_code for error in BY_CODE.values())}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
@pytest.mark.parametrize("unit_file", [UNIT, SERVER_UNIT], ids=lambda path: path.stem)
def test_unit_verifies(tmp_path: Path, unit_file: Path) -> None:
    text = re.sub("/opt/headtail/bin/edge-(client|server)", "/bin/true", unit_file.read_text())
    unit = tmp_path / unit_file.name
    unit.write_text(text)
    run = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=30, check=False
    )
    if "Failed to" in run.stderr and unit_file.name not in run.stderr:
        pytest.skip(f"systemd-analyze cannot verify here: {run.stderr.strip()}")
    assert (run.returncode, run.stderr) == (0, "")


def certs(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(DEPLOY / "certs.sh"), *arguments], capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_certificates_serve_their_purpose_only(tmp_path: Path) -> None:
    pki = str(tmp_path / "pki")
    for arguments in (("ca", pki), ("server", pki, "edge", "localhost", "127.0.0.1"), ("client", pki, "camera-1")):
        run = certs(*arguments)
        assert run.returncode == 0, run.stderr
    assert {p.name for p in (tmp_path / "pki").iterdir()} == {
        "ca.pem",
        "ca.key",
        "edge.pem",
        "edge.key",
        "camera-1.pem",
        "camera-1.key",
    }
    assert all(p.stat().st_mode & 0o77 == 0 for p in (tmp_path / "pki").glob("*.key")), "keys are their owner's alone"
    for name, purpose, good in (
        ("edge", "sslserver", True),
        ("edge", "sslclient", False),
        ("camera-1", "sslclient", True),
        ("camera-1", "sslserver", False),
    ):
        check = subprocess.run(
            ["openssl", "verify", "-CAfile", f"{pki}/ca.pem", "-purpose", purpose, f"{pki}/{name}.pem"],
            capture_output=True,
            check=False,
        )
        assert (check.returncode == 0) is good, (name, purpose)
    shown = certs("show", pki, "edge").stdout
    assert "DNS:localhost, IP Address:127.0.0.1" in shown


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize(
    "arguments",
    [("client", "{}", "../evil"), ("client", "{}", "ca"), ("server", "{}", "edge", "a,DNS:b"), ("server", "{}", "edge"), ()],
)
def test_certificates_refuse(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert certs("ca", str(tmp_path)).returncode == 0
    before = (tmp_path / "ca.key").read_bytes()
    run = certs(*(a.format(tmp_path) for a in arguments))
    assert run.returncode == 2
    assert certs("ca", str(tmp_path)).returncode == 2, "an authority is never overwritten"
    assert (tmp_path / "ca.key").read_bytes() == before
    assert {p.name for p in tmp_path.iterdir()} == {"ca.key", "ca.pem"}


def test_ci_runs_what_every_submission_runs() -> None:
    workflow = load(ROOT / ".github" / "workflows" / "ci.yml")
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(".ci/run" in step for step in steps)
    assert workflow["permissions"] == {"contents": "read"}
