"""KEDA beside the operator: by its definitions and its protocol, with the scale written by the test; and KEDA's own operator (long)."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
import yaml
from google.protobuf.descriptor_pb2 import FieldDescriptorProto
from tests.cluster.conftest import Start, install
from tests.cluster.harness import Api, free_port, wait_for
from tests.cluster.test_modeldeployment import NAME, Stage, gateway, operators_fields, stage  # noqa: F401 - fixtures

from tuneloop_operator.runtime.scaler import MESSAGES, M

MODULE = "github.com/kedacore/keda/v2@v2.18.3"
LEFT_OUT = {"newrelic": "NewNewRelicScaler", "solarwinds": "NewSolarWindsScaler"}
"""Scalers that need modules which the module proxy does not have: KEDA's operator is built without them."""
PROTOCOL = "pkg/scalers/externalscaler/externalscaler.proto"
SILENT = "http://127.0.0.1:9"
NIGHT = {"start": "0 20 * * *", "end": "0 22 * * *", "timezone": "Europe/Berlin", "replicas": 2}
WORDS = {getattr(FieldDescriptorProto, f"TYPE_{word.upper()}"): word for word in ("string", "bool", "int64", "double")}


@pytest.fixture(scope="module")
def source() -> Path:
    fetched = subprocess.run(["go", "mod", "download", "-json", MODULE], check=True, capture_output=True, text=True, timeout=300)
    return Path(json.loads(fetched.stdout)["Dir"])


@pytest.fixture
def definitions(api: Api, source: Path) -> None:
    """KEDA's kinds. They stay installed: other operators may watch them."""
    for path in sorted((source / "config" / "crd" / "bases").glob("*.yaml")):
        install(api, yaml.safe_load(path.read_text()))


@pytest.fixture
def start_scaler(definitions: None, start_operator: Start) -> Callable[..., str]:
    """Starts an operator that finds KEDA; the address of its scaler."""

    def start(**more: str) -> str:
        address = f"127.0.0.1:{free_port()}"
        start_operator(TUNELOOP_SCALER_ADDRESS=address, TUNELOOP_SCALER_PORT=address.rpartition(":")[2], **more)
        return address

    return start


@pytest.fixture(scope="module")
def program(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """KEDA's operator, built once on a machine: some 15 minutes on two cores."""
    built = Path.home() / ".cache" / "tuneloop" / f"keda-operator-{MODULE.rpartition('@')[2]}"
    if not built.exists():
        copy = tmp_path_factory.mktemp("keda") / "source"
        shutil.copytree(source, copy, copy_function=shutil.copyfile)
        for folder in (copy, *(path for path in copy.rglob("*") if path.is_dir())):
            folder.chmod(0o755)
        builder = copy / "pkg" / "scaling" / "scalers_builder.go"
        text = builder.read_text()
        for name, made_by in LEFT_OUT.items():
            (copy / "pkg" / "scalers" / f"{name}_scaler.go").unlink()
            text = re.sub(rf'\tcase "[\w-]+":\n\t\treturn scalers\.{made_by}\(config\)\n', "", text)
        builder.write_text(text)
        built.parent.mkdir(parents=True, exist_ok=True)
        build = ["go", "build", "-mod=mod", "-trimpath", "-ldflags=-s -w", "-o", f"{built}.part", "./cmd/operator"]
        subprocess.run(build, cwd=copy, check=True, timeout=3600)
        Path(f"{built}.part").rename(built)
    return built


@pytest.fixture
def keda(cluster_kubeconfig: str, namespace: str, program: Path, definitions: None, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """It sees this namespace alone. Without its metrics adapter: from one replica on nothing scales here."""
    certificate(tmp_path)
    ports = [f"--{name}-bind-address=127.0.0.1:{free_port()}" for name in ("metrics", "health-probe", "metrics-service")]
    more = {
        "KUBECONFIG": cluster_kubeconfig,
        "WATCH_NAMESPACE": namespace,
        "POD_NAMESPACE": namespace,
        "KEDA_CLUSTER_OBJECT_NAMESPACE": namespace,
    }
    log = tmp_path / "keda.log"
    with log.open("wb") as output:
        running = subprocess.Popen([program, *ports, f"--cert-dir={tmp_path}"], env={**os.environ, **more}, stdout=output, stderr=output)
    yield running
    running.terminate()
    running.wait(60)
    print(log.read_text()[-6000:])


def certificate(folder: Path) -> None:
    """For the port that KEDA's metrics adapter would ask."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-keyout", folder / "tls.key", "-out", folder / "tls.crt", "-subj", "/CN=keda"],
        check=True, capture_output=True,
    )  # fmt: skip
    (folder / "ca.crt").write_bytes((folder / "tls.crt").read_bytes())


def test_we_speak_kedas_protocol(source: Path) -> None:
    text = re.sub(r"//.*", "", (source / PROTOCOL).read_text())
    theirs = dict(re.findall(r"message (\w+) \{(.*?)\}", text, re.S))
    for message, fields in MESSAGES.items():
        told = {name: (type_, int(number)) for type_, name, number in re.findall(r"([\w.]+) (\w+) = (\d+);", theirs[message])}
        for name, (number, type_) in fields.items():
            assert told[name] == (type_ if isinstance(type_, str) else WORDS[type_], number)
    assert {"IsActive", "StreamIsActive", "GetMetricSpec", "GetMetrics"} == set(re.findall(r"rpc (\w+)\(", text))


def test_between_zero_and_one_keda_alone_decides_by_what_we_push(
    start_scaler: Callable[..., str], stage: Stage, api: Api, namespace: str  # noqa: F811
) -> None:  # fmt: skip
    def scale(replicas: int) -> None:
        api.patch("ModelDeployment", namespace, NAME, {"spec": {"replicas": replicas}}, "scale")

    scaler = start_scaler(TUNELOOP_PROMETHEUS_URL=SILENT)
    stage.serve(autoscaling={"minReplicas": 0, "maxReplicas": 3, "idleSeconds": 1, "schedule": [NIGHT]})
    made = wait_for(lambda: api.get("ScaledObject", namespace, NAME), what="a ScaledObject")
    assert made is not None
    assert [trigger["type"] for trigger in made["spec"]["triggers"]] == ["external-push", "prometheus", "cron"]
    reference = M["ScaledObjectRef"](name=NAME, namespace=namespace)
    with grpc.insecure_channel(scaler) as channel:
        service = "/externalscaler.ExternalScaler"
        is_active = channel.unary_unary(f"{service}/IsActive", type(reference).SerializeToString, M["IsActiveResponse"].FromString)
        pushes = channel.unary_stream(f"{service}/StreamIsActive", type(reference).SerializeToString, M["IsActiveResponse"].FromString)
        stage.gateway.idle = 100
        wait_for(lambda: not is_active(reference).result, what="the end of the activity")
        stage.wait("Ready", "True", "Serving")  # nobody but KEDA stops it
        scale(0)
        stage.wait("Ready", "True", "ScaledToZero")
        pushed = pushes(reference)
        stage.gateway.held, stage.gateway.idle = 1, 0
        assert next(pushed).result
        assert is_active(reference).result
        stage.wait("Ready", "True", "ScaledToZero")
        scale(1)
        stage.start_engine(1)
        stage.wait("Ready", "True", "Serving")
        pushed.cancel()
    assert not operators_fields(api, namespace)


@pytest.mark.long
@pytest.mark.timeout(4000)
def test_keda_itself_stops_an_idle_engine_and_starts_it_for_a_request(
    keda: subprocess.Popen[bytes], start_scaler: Callable[..., str], stage: Stage, api: Api, namespace: str  # noqa: F811
) -> None:  # fmt: skip
    start_scaler()
    stage.serve(autoscaling={"minReplicas": 0, "maxReplicas": 2, "idleSeconds": 5})
    stage.wait("Ready", "True", "Serving")
    stage.gateway.idle = 100
    api.wait_for_condition("ModelDeployment", namespace, NAME, "Ready", "True", "ScaledToZero", timeout=120)
    engine = stage.engine(1)
    wait_for(lambda: not stage.play.pods(engine), what="no pods")
    stage.gateway.held, stage.gateway.idle = 1, 0
    began = time.monotonic()
    wait_for(lambda: (api.get("Deployment", namespace, engine) or {})["spec"]["replicas"] == 1, what="a replica")
    print(f"from a request that waits to a replica, by KEDA: {time.monotonic() - began:.2f} s")
    stage.start_engine(1)
    stage.wait("Ready", "True", "Serving")
    assert not operators_fields(api, namespace), "KEDA alone writes the scale"
    assert keda.poll() is None
