"""What KEDA is told, by its own definitions and protocol; the test writes the scale as KEDA does."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
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
