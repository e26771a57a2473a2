"""The manifests as far as they can be judged without a cluster: names that refer to each other, and the fields that matter.

House rule: structure and references are checked here, and Kubernetes' own schemas; nothing has been applied to a cluster.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from powerd_integrations.fleet import settings as configured
from powerd_integrations.fleet.sidecar import _arguments
from powerd_integrations.keda.hpa import Hpa
from powerd_integrations.keda.scaler import METRIC, Asked

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "kubernetes"
KUBERNETES = "1.37"
OTHERS = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1"}  # KEDA's and the Prometheus operator's, which bring their own
FILES = sorted(FOLDER.glob("*.yaml"))
DOCUMENTS = [document for file in FILES for document in yaml.safe_load_all(file.read_text(encoding="utf-8"))]


def of(kind: str) -> list[dict[str, Any]]:
    return [document for document in DOCUMENTS if document["kind"] == kind]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [document for document in of(kind) if document["metadata"]["name"] == name]
    return found


def fleet() -> configured.FleetSettings:
    return configured.parse(named("ConfigMap", "powerd-planner")["data"]["fleet.toml"])


def containers(document: dict[str, Any]) -> list[dict[str, Any]]:
    return list(document["spec"]["template"]["spec"]["containers"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_every_object_says_what_it_is(document: dict[str, Any]) -> None:
    assert re.fullmatch(r"(v1|[a-z.]+/v\d+((alpha|beta)\d+)?)", document["apiVersion"])
    assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", document["metadata"]["name"])
    assert "spec" in document or document["kind"] == "ConfigMap"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: f"{d['kind']}-{d['metadata']['name']}")
def test_kubernetes_own_schema_takes_it_and_no_field_is_unknown(document: dict[str, Any]) -> None:
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        assert document["apiVersion"] in OTHERS


def test_no_two_objects_have_one_name() -> None:
    names = [(document["kind"], document["metadata"]["name"]) for document in DOCUMENTS]
    assert len(names) == len(set(names))


def test_selectors_choose_the_pods_that_are_meant() -> None:
    for deployment in of("Deployment"):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for service in of("Service"):
        chosen = [
            d
            for d in of("Deployment")
            if service["spec"]["selector"].items() <= d["spec"]["template"]["metadata"]["labels"].items()
        ]
        assert [d["metadata"]["name"] for d in chosen] == [service["metadata"]["name"]]
        ports = {port["name"] for port in containers(chosen[0])[0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def test_volumes_are_mounted_and_probes_use_ports_that_there_are() -> None:
    for deployment in of("Deployment"):
        spec = deployment["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in spec.get("volumes", ())}
        everyone = [*spec["containers"], *spec.get("initContainers", ())]
        assert {mount["name"] for container in everyone for mount in container.get("volumeMounts", ())} == volumes
        for container in spec["containers"]:
            probe = container["readinessProbe"]
            assert (probe.get("httpGet") or probe["tcpSocket"])["port"] in {port["name"] for port in container["ports"]}


def test_groups_deployments_and_scaled_objects_are_the_same() -> None:
    groups = {(row.pool, row.tp): row for row in fleet().groups}
    assert sum(row.tp for row in groups.values()) <= fleet().planner.gpus
    seen = {}
    for scaled in of("ScaledObject"):
        (trigger,) = scaled["spec"]["triggers"]
        asked = Asked.read(trigger["metadata"])
        row = groups[asked.group.pool, asked.group.tp]
        deployment = named("Deployment", scaled["spec"]["scaleTargetRef"]["name"])
        seen[asked.group.pool, asked.group.tp] = deployment
        assert (scaled["spec"]["minReplicaCount"], scaled["spec"]["maxReplicaCount"]) == (row.min_replicas, row.max_replicas)
        assert row.targets == (f"dns://{deployment['metadata']['name']}:8000",)
        assert "replicas" not in deployment["spec"], "the autoscaler's"
        (engine,) = containers(deployment)
        words = engine["args"]
        ours = _arguments(words[: words.index("--")], words[words.index("--") + 1 :])
        assert ours.chunk_tokens == fleet().engine.chunk_tokens
        assert (ours.pool, ours.tp, ours.planner) == (row.pool, row.tp, None), "the planner scrapes it: no second report"
        slo, shorter = fleet().classes.by_prompt()
        assert (ours.ttft, ours.tbt) == (slo.ttft_s, slo.tbt_s)
        assert ours.ttft_up_to == [(each.max_prompt_tokens, each.ttft_s) for each in shorter], "what its pool serves"
        assert f"--tensor-parallel-size={row.tp}" in words
        assert engine["resources"]["limits"]["nvidia.com/gpu"] == row.tp
        grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        (shutdown,) = [int(word.partition("=")[2]) for word in words if word.startswith("--shutdown-timeout=")]
        assert grace > ours.settle + shutdown, "a Pod is not killed while it drains"
    assert set(seen) == set(groups)


def test_keda_asks_our_scaler_for_our_metric_and_follows_at_once() -> None:
    service = named("Service", "powerd-keda")
    (port,) = [row["port"] for row in service["spec"]["ports"]]
    listen = containers(named("Deployment", "powerd-keda"))[0]["command"]
    assert listen[listen.index("--listen") + 1].endswith(f":{port}")
    assert listen[listen.index("--plan") + 1] == "http://powerd-planner:9480"
    assert METRIC.replace("-", "_") == "powerd_desired_replicas"
    for scaled in of("ScaledObject"):
        spec = scaled["spec"]
        (trigger,) = spec["triggers"]
        assert (trigger["type"], trigger["metricType"]) == ("external-push", "AverageValue")
        assert trigger["metadata"]["scalerAddress"] == f"powerd-keda:{port}"
        assert all(isinstance(value, str) for value in trigger["metadata"].values())
        assert spec["fallback"]["behavior"] == "currentReplicasIfHigher"
        _follows_at_once(spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"], spec["maxReplicaCount"])


def test_a_plain_autoscaler_reads_the_gauge() -> None:
    (rule,) = yaml.safe_load(named("ConfigMap", "powerd-adapter-rules")["data"]["config.yaml"])["externalRules"]
    for hpa in of("HorizontalPodAutoscaler"):
        (metric,) = hpa["spec"]["metrics"]
        external = metric["external"]
        assert external["metric"]["name"] == rule["name"]["as"] == rule["seriesQuery"]
        assert set(external["metric"]["selector"]["matchLabels"]) == {"pool", "tp"}
        assert external["target"] == {"type": "AverageValue", "averageValue": "1"}
        assert named("Deployment", hpa["spec"]["scaleTargetRef"]["name"])
        _follows_at_once(hpa["spec"]["behavior"], hpa["spec"]["maxReplicas"])


def _follows_at_once(behavior: dict[str, Any], most: int) -> None:
    """With these rules the HPA's own formula goes from any count to any other in one step."""
    for rules in (behavior["scaleUp"], behavior["scaleDown"]):
        assert rules["stabilizationWindowSeconds"] == 0
        assert max(policy["value"] for policy in rules["policies"] if policy["type"] == "Pods") >= most
    for now in range(1, most + 1):
        for wanted in range(1, most + 1):
            assert Hpa(now, float(behavior["scaleUp"]["tolerance"]), 0.0).update(0.0, wanted) == wanted


def test_nothing_of_ours_runs_with_more_than_it_needs() -> None:
    for name in ("powerd-planner", "powerd-keda"):
        spec = named("Deployment", name)["spec"]["template"]["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            module = container["command"][2]
            assert (FOLDER.parent / Path(*module.split(".")) / "__main__.py").exists()


def test_the_planner_is_alone_and_is_scraped() -> None:
    planner = named("Deployment", "powerd-planner")
    assert (planner["spec"]["replicas"], planner["spec"]["strategy"]["type"]) == (1, "Recreate")
    (monitor,) = of("ServiceMonitor")
    service = named("Service", "powerd-planner")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert monitor["spec"]["endpoints"][0]["port"] == service["spec"]["ports"][0]["name"]
    assert fleet().planner.listen.rpartition(":")[2] == str(service["spec"]["ports"][0]["port"])
