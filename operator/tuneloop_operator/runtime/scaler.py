"""KEDA's external scaler, served over gRPC: zero to one as soon as a request waits, and no scale-in while an engine loads.

Every replica of the operator serves it: each watches, and asks the gateways itself. It only answers; KEDA writes the scale.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.descriptor_pb2 import FieldDescriptorProto, FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from tuneloop_operator.cluster.activity import Activity, Silent, look
from tuneloop_operator.cluster.client import Cluster

log = logging.getLogger(__name__)
PACKAGE = "externalscaler"
METRIC = "least-replicas"
LOOK_SECONDS = 1.0
MAX_STREAMS = 10_000
MAX_MESSAGE_BYTES = 64 << 10

F = FieldDescriptorProto
MESSAGES: dict[str, dict[str, tuple[int, int | str]]] = {
    "ScaledObjectRef": {"name": (1, F.TYPE_STRING), "namespace": (2, F.TYPE_STRING)},
    "IsActiveResponse": {"result": (1, F.TYPE_BOOL)},
    "MetricSpec": {"metricName": (1, F.TYPE_STRING), "targetSize": (2, F.TYPE_INT64), "targetSizeFloat": (3, F.TYPE_DOUBLE)},
    "GetMetricSpecResponse": {"metricSpecs": (1, "MetricSpec")},
    "GetMetricsRequest": {"scaledObjectRef": (1, "ScaledObjectRef"), "metricName": (2, F.TYPE_STRING)},
    "MetricValue": {"metricName": (1, F.TYPE_STRING), "metricValue": (2, F.TYPE_INT64), "metricValueFloat": (3, F.TYPE_DOUBLE)},
    "GetMetricsResponse": {"metricValues": (1, "MetricValue")},
}
"""Message -> field -> (number, type): as much of KEDA's externalscaler.proto as is read or written. Unknown fields are passed over."""


def _messages() -> dict[str, Any]:
    """Their classes. A field whose name is a plural is repeated."""
    file = FileDescriptorProto(name="externalscaler.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, type_) in fields.items():
            label = F.LABEL_REPEATED if field.endswith("s") else F.LABEL_OPTIONAL
            if isinstance(type_, str):
                message.field.add(name=field, number=number, label=label, type=F.TYPE_MESSAGE, type_name=f".{PACKAGE}.{type_}")
            else:
                message.field.add(name=field, number=number, label=label, type=type_)
    pool = DescriptorPool()
    pool.Add(file)
    return {name: GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}


M = _messages()


class Scaler:
    """The gRPC server."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self._server: Any = None

    async def start(self, address: str) -> int:
        """Listens, and returns the port."""
        handlers = {
            "IsActive": _unary(self.is_active, "ScaledObjectRef", "IsActiveResponse"),
            "GetMetricSpec": _unary(self.get_metric_spec, "ScaledObjectRef", "GetMetricSpecResponse"),
            "GetMetrics": _unary(self.get_metrics, "GetMetricsRequest", "GetMetricsResponse"),
            "StreamIsActive": grpc.unary_stream_rpc_method_handler(
                self.stream_is_active,
                request_deserializer=M["ScaledObjectRef"].FromString,
                response_serializer=M["IsActiveResponse"].SerializeToString,
            ),
        }
        limits = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES), ("grpc.so_reuseport", 0)]
        self._server = grpc.aio.server(options=limits, maximum_concurrent_rpcs=MAX_STREAMS)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(f"{PACKAGE}.ExternalScaler", handlers),))
        port: int = self._server.add_insecure_port(address)
        await self._server.start()
        return port

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(grace=None)

    # --- what KEDA asks ---

    async def is_active(self, request: Any, context: Any) -> Any:
        return M["IsActiveResponse"](result=(await self._look(request, context)).is_active)

    async def get_metric_spec(self, request: Any, context: Any) -> Any:
        """One replica for each that is told."""
        return M["GetMetricSpecResponse"](metricSpecs=[M["MetricSpec"](metricName=METRIC, targetSize=1, targetSizeFloat=1)])

    async def get_metrics(self, request: Any, context: Any) -> Any:
        least = (await self._look(request.scaledObjectRef, context)).least_replicas
        return M["GetMetricsResponse"](metricValues=[M["MetricValue"](metricName=METRIC, metricValue=least, metricValueFloat=least)])

    async def stream_is_active(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Says "active" each second in which requests wait for an engine at zero, and nothing else: a pushed "inactive" would stop what
        other triggers want. That it is idle KEDA asks itself."""
        while True:
            try:
                found = await look(self.cluster, request.namespace, request.name, datetime.now(UTC))
            except Silent:
                found = None  # it may be about to start
            if found is not None and found.is_awaited:
                yield M["IsActiveResponse"](result=True)
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self, reference: Any, context: Any) -> Activity:
        try:
            found = await look(self.cluster, reference.namespace, reference.name, datetime.now(UTC))
        except Silent as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
            raise
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "there is no such ModelDeployment with autoscaling")
            raise AssertionError  # abort raises
        return found


def _unary(answer: Any, request: str, response: str) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=M[request].FromString, response_serializer=M[response].SerializeToString
    )
