"""KEDA's ``externalscaler`` contract as protobuf messages, built from one table.

House rules: the table says what `externalscaler.proto` says, and a test compiles that file and compares; no generated code, so
that one version of ours works with every protobuf runtime; nothing is imported from protobuf before it is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Final

PACKAGE: Final = "externalscaler"
SERVICE: Final = "externalscaler.ExternalScaler"

#: message -> its fields in the order of their numbers: (name, type); [] is repeated, {} a map of text to text.
MESSAGES: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "ScaledObjectRef": (("name", "string"), ("namespace", "string"), ("scalerMetadata", "{}")),
    "IsActiveResponse": (("result", "bool"),),
    "GetMetricSpecResponse": (("metricSpecs", "[]MetricSpec"),),
    "MetricSpec": (("metricName", "string"), ("targetSize", "int64"), ("targetSizeFloat", "double")),
    "GetMetricsRequest": (("scaledObjectRef", "ScaledObjectRef"), ("metricName", "string")),
    "GetMetricsResponse": (("metricValues", "[]MetricValue"),),
    "MetricValue": (("metricName", "string"), ("metricValue", "int64"), ("metricValueFloat", "double")),
}


@dataclass(frozen=True, slots=True)
class Method:
    """One call of the service."""

    name: str
    request: str
    response: str
    streams: bool = False


METHODS: Final = (
    Method("IsActive", "ScaledObjectRef", "IsActiveResponse"),
    Method("StreamIsActive", "ScaledObjectRef", "IsActiveResponse", streams=True),
    Method("GetMetricSpec", "ScaledObjectRef", "GetMetricSpecResponse"),
    Method("GetMetrics", "GetMetricsRequest", "GetMetricsResponse"),
    Method("StreamMetricSpec", "ScaledObjectRef", "GetMetricSpecResponse", streams=True),
)


@cache
def file_descriptor() -> Any:
    """Return the contract as a ``FileDescriptorProto``."""
    from google.protobuf import descriptor_pb2

    kinds = descriptor_pb2.FieldDescriptorProto
    scalars = {"string": kinds.TYPE_STRING, "bool": kinds.TYPE_BOOL, "int64": kinds.TYPE_INT64, "double": kinds.TYPE_DOUBLE}
    file = descriptor_pb2.FileDescriptorProto(name="externalscaler.proto", package=PACKAGE, syntax="proto3")
    for name, fields in MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, kind) in enumerate(fields, 1):
            row = message.field.add(name=field, number=number, json_name=field, label=kinds.LABEL_OPTIONAL)
            if kind in scalars:
                row.type = scalars[kind]
                continue
            row.type = kinds.TYPE_MESSAGE
            if kind.startswith("[]") or kind == "{}":
                row.label = kinds.LABEL_REPEATED
            if kind == "{}":
                entry = message.nested_type.add(name=f"{field[0].upper()}{field[1:]}Entry")
                entry.options.map_entry = True
                for place, part in enumerate(("key", "value"), 1):
                    entry.field.add(name=part, number=place, json_name=part, label=kinds.LABEL_OPTIONAL, type=kinds.TYPE_STRING)
                row.type_name = f".{PACKAGE}.{name}.{entry.name}"
            else:
                row.type_name = f".{PACKAGE}.{kind.removeprefix('[]')}"
    service = file.service.add(name="ExternalScaler")
    for method in METHODS:
        service.method.add(
            name=method.name,
            input_type=f".{PACKAGE}.{method.request}",
            output_type=f".{PACKAGE}.{method.response}",
            server_streaming=method.streams or None,
        )
    return file


@cache
def messages() -> dict[str, Any]:
    """Return the message classes by name, in a pool of their own: another copy of the contract may be loaded beside."""
    from google.protobuf import descriptor_pool, message_factory

    pool = descriptor_pool.DescriptorPool()
    pool.Add(file_descriptor())
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{PACKAGE}.{name}")) for name in MESSAGES}
