"""KEDA's side of the contract, with stubs that the real compiler makes: ``keda_job.py PROTO FOLDER ADDRESS PLAN.JSON``.

House rules: nothing of ours is imported but the table that is compared; what was heard is one JSON object on stdout.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

import grpc
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

from powerd_integrations.keda import contract


def main() -> None:
    proto, folder, address, plan = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    made = folder / "set.pb"
    flags = [f"-I{proto.parent}", f"--python_out={folder}", f"--grpc_python_out={folder}", f"--descriptor_set_out={made}"]
    assert protoc.main(["protoc", *flags, str(proto)]) == 0
    (compiled,) = descriptor_pb2.FileDescriptorSet.FromString(made.read_bytes()).file
    ours = descriptor_pb2.FileDescriptorProto()
    ours.CopyFrom(contract.file_descriptor())
    ours.ClearField("options")
    same = ours == compiled

    sys.path.insert(0, str(folder))
    import externalscaler_pb2 as messages
    import externalscaler_pb2_grpc as stubs

    stub = stubs.ExternalScalerStub(grpc.insecure_channel(address))

    def reference(**metadata: str) -> object:
        return messages.ScaledObjectRef(name="ll", namespace="llm", scalerMetadata=metadata)

    def metric(**metadata: str) -> float:
        asked = messages.GetMetricsRequest(scaledObjectRef=reference(**metadata), metricName="powerd-desired-replicas")
        return float(stub.GetMetrics(asked, timeout=10, wait_for_ready=True).metricValues[0].metricValueFloat)

    def refused(**metadata: str) -> str:
        try:
            metric(**metadata)
        except grpc.RpcError as error:
            return f"{error.code().name}: {error.details()}"
        return ""

    heard: dict[str, object] = {"same": same}
    heard["eleven"] = metric(pool="LL", tp="8")
    heard["cleared"] = metric(pool="LL", tp="8", tolerance="0.1")
    spec = stub.GetMetricSpec(reference(pool="LL", tp="8"), timeout=10).metricSpecs[0]
    heard["spec"] = [spec.metricName, spec.targetSize, spec.targetSizeFloat]
    heard["streamed_spec"] = (
        next(iter(stub.StreamMetricSpec(reference(pool="LL", tp="8"), timeout=10))).metricSpecs[0].targetSizeFloat
    )
    heard["active"] = [stub.IsActive(reference(pool="LL", tp=tp), timeout=10).result for tp in ("8", "4")]
    heard["refused"] = [refused(), refused(pool="LL", tp="two"), refused(pool="XX", tp="8")]

    pushed: list[bool] = []
    two = threading.Event()

    def listen() -> None:
        for answer in stub.StreamIsActive(reference(pool="LL", tp="4"), timeout=30):
            pushed.append(answer.result)
            if len(pushed) == 2:
                two.set()
                return
            document = json.loads(plan.read_text())
            for row in document["desired_replicas"]:
                row["replicas"] = 3 if row["tp"] == 4 else row["replicas"]
            beside = plan.with_suffix(".new")
            beside.write_text(json.dumps(document))
            beside.replace(plan)

    thread = threading.Thread(target=listen)
    thread.start()
    two.wait(30)
    thread.join(30)
    heard["pushed"] = pushed
    print(json.dumps(heard))


if __name__ == "__main__":
    main()
