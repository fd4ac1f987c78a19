"""The operator's settings: one frozen class, read from the environment once, in main."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Settings(BaseModel):
    """Every setting has an environment variable `TUNELOOP_<NAME>`; the chart sets them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    namespace: str = Field(
        default="tuneloop-system", description="Namespace of the operator itself: its Lease, and who may reach gateways and trainers."
    )
    watch_namespaces: tuple[str, ...] = Field(default=(), description="Namespaces to watch; empty = all.")
    identity: str = Field(default="operator", description="Holder of the Lease; the pod's name.")
    leader_election: bool = True
    trainer_image: str = "tuneloop-trainer:dev"
    gateway_image: str = "tuneloop-gateway:dev"
    engine_image: str = "vllm/vllm-openai:v0.32.0"
    engine_cpu_image: str | None = Field(default=None, description="Engine image for accelerators 0; absent = engine_image.")
    engine_command: tuple[str, ...] = ("python3", "-m", "vllm.entrypoints.openai.api_server")
    engine_version_floor: str = Field(
        default="0.22.0",
        pattern=r"^\d{1,4}\.\d{1,4}(\.\d{1,4})?$",
        description="vLLM below this release has flaws that let requests past its key.",
    )
    vulnerable_engines: Literal["Warn", "Refuse"] = Field(
        default="Warn", description="Refuse: a revision whose vLLM is below the floor takes no traffic."
    )
    image_pull_policy: str = "IfNotPresent"
    pod_user: int | None = Field(default=65532, description="runAsUser of trainer and gateway pods; None = the platform's choice.")
    engine_user: int | None = Field(
        default=65533, description="runAsUser of engine pods, which only read what trainers wrote; None = the platform's choice."
    )
    fs_group: int | None = Field(default=65532, description="One fsGroup per namespace, so that stages and engines share files.")
    prometheus_url: str | None = Field(
        default=None, description="Prometheus that monitoring.source: Prometheus reads, e.g. http://prometheus.monitoring:9090."
    )
    prometheus_token_file: str | None = None
    device: str | None = Field(
        default=None, description="Device that estimates are made for where a job's node selector names none, e.g. h100."
    )
    scaler_address: str | None = Field(
        default=None, description="host:port where KEDA reaches our external scaler; None = KEDA is not made use of."
    )
    scaler_port: int = Field(default=9090, description="Where the external scaler listens, if it has an address.")
    workers: int = 8
    metrics_port: int = 8080
    progress_interval_seconds: float = 10.0
    state_interval_seconds: float = 5.0
    silence_seconds: float = Field(
        default=180.0, gt=0, description="/healthz fails when a watch gave no sign of life for so long while the API server answered."
    )
    lease_seconds: int = 9
    renew_seconds: int = 6
    retry_seconds: int = 2


def read_settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Settings from `TUNELOOP_*` variables. Tuples are separated by commas, `none` is None. Raises pydantic.ValidationError."""
    values: dict[str, object] = {}
    for name, field in Settings.model_fields.items():
        text = environment.get(f"TUNELOOP_{name.upper()}")
        if text is None or text == "":
            continue
        if text == "none":
            values[name] = None
            continue
        is_tuple = isinstance(field.default, tuple)
        values[name] = tuple(part for part in text.split(",") if part) if is_tuple else text
    return Settings.model_validate(values)
