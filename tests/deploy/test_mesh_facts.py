"""What the check reads from the code, and how it reads NetworkPolicies. Needs no tools."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from deploy.check import network
from deploy.check.manifests import Manifests, Tree, parse
from deploy.check.mesh import Service, edges, registered_services, services_of_code
from deploy.check.vendor_schemas import strict_schemas, write

POD = """
kind: Deployment
metadata: {name: tenant}
spec: {template: {metadata: {labels: {app: tenant}}}}
---
kind: Deployment
metadata: {name: metering}
spec: {template: {metadata: {labels: {app: metering}}}}
---
"""


def policy(rule: str) -> Manifests:
    """Returns two workloads and one policy on the first."""
    spec = f"{{podSelector: {{matchLabels: {{app: tenant}}}}, policyTypes: [Egress], egress: [{rule}]}}"
    return parse(f"{POD}\nkind: NetworkPolicy\nmetadata: {{name: p}}\nspec: {spec}\n")


def flows(rule: str) -> set[tuple[str, str]]:
    """Returns what the rule lets the first workload reach."""
    manifests = policy(rule)
    return set(network.egress(manifests, manifests.workloads()[0]))


@pytest.fixture(scope="module")
def services() -> dict[str, Service]:
    """The services as the code shows them."""
    return services_of_code()


def test_edges_are_those_of_the_contracts(services: dict[str, Service]) -> None:
    """Retrieval is called by callers outside, inference and tenant; retrieval itself calls only tenant."""
    found = edges(services.values())
    assert {caller for caller, callee in found if callee == "retrieval"} == {"external", "inference", "tenant"}
    assert {callee for caller, callee in found if caller == "retrieval"} == {"tenant"}


def test_every_service_has_a_port_of_its_own(services: dict[str, Service]) -> None:
    """Five services listen on five ports."""
    assert {service.port for service in services.values()} == {7401, 7402, 7403, 7404, 7405}


def test_required_settings_leave_out_what_has_no_place_in_a_cluster(services: dict[str, Service]) -> None:
    """Stores, peers and keys are required; bearers of loopback and the admin connection are not."""
    required = services["inference"].required_fields()
    assert {"postgres_dsn", "metering_address", "anthropic_api_key", "tls_ca_file"} <= required
    assert not {"service_token", "peer_token_hashes", "postgres_admin_dsn", "provider_base_url", "inference_address"} & required


def test_settings_are_made_of_the_manifest_alone(services: dict[str, Service], monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the checking process fills nothing that a manifest forgot."""
    monkeypatch.setenv("TENANTRY_LOG_LEVEL", "DEBUG")
    assert services["tenant"].configured({"OTHER": "x"}).log_level == "INFO"
    with pytest.raises(ValidationError, match="not loopback"):
        services["tenant"].configured({"TENANTRY_LISTEN_ADDRESS": "0.0.0.0:7401"})


def test_registered_services_are_read_without_running(tmp_path: Path) -> None:
    """Only whole names of services count, wherever the composition root has them."""
    app = tmp_path / "app.py"
    app.write_text('servers = [(add, x, "mesh.tenant.v1.TenantService")]\n"""See mesh.tenant.v1.PlanService."""\nraise SystemExit\n')
    assert registered_services(app) == {"mesh.tenant.v1.TenantService"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("{to: [{podSelector: {matchLabels: {app: metering}}}], ports: [{port: 7405}]}", ("metering", "TCP/7405")),
        ("{to: [{podSelector: {matchLabels: {app: other}}}], ports: [{port: 1}]}", ("nobody with app=other", "TCP/1")),
        ("{ports: [{port: 53, protocol: UDP}]}", ("anyone", "UDP/53")),
        ("{to: [{namespaceSelector: {}}]}", ("namespace any", "any")),
        ("{to: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: 1, endPort: 9}]}", ("addresses 10.0.0.0/8", "TCP/1-9")),
        ("{to: [{ipBlock: {cidr: nonsense}}], ports: [{port: 1}]}", ("unreadable addresses", "TCP/1")),
        ("{to: [{podSelector: {matchExpressions: [{key: app, operator: Exists}]}}], ports: [{port: 1}]}", ("unreadable", "TCP/1")),
    ],
)
def test_policy_is_read_for_what_it_allows(rule: str, expected: tuple[str, str]) -> None:
    """Each form of a rule becomes the traffic it lets through; what cannot be read is shown as it is."""
    (peer, port), *others = flows(rule)
    assert not others
    assert peer.startswith(expected[0])
    assert port == expected[1]


def test_empty_pod_selector_means_every_workload() -> None:
    """A rule for all pods lets through to each of them."""
    assert flows("{to: [{podSelector: {}}], ports: [{port: 1}]}") == {("tenant", "TCP/1"), ("metering", "TCP/1")}


def test_difference_names_both_sides() -> None:
    """A missing flow and one too many are told apart."""
    told = list(network.difference("egress", frozenset({("a", "TCP/1")}), frozenset({("b", "TCP/2")})))
    assert told == ["egress to b on TCP/2 is needed and not allowed", "egress to a on TCP/1 is allowed and not needed"]


def test_vendored_schemas_refuse_unknown_fields_and_a_status(tmp_path: Path) -> None:
    """A schema made from OpenAPI pins kind and version, closes every object with fields, and has no status."""
    definitions = {name: openapi(name) for name in openapi_names()}
    schemas = strict_schemas(definitions)
    write(schemas, tmp_path / "v1")
    body = schemas["deployment-apps-v1"]["definitions"]["io.k8s.api.apps.v1.Deployment"]  # type: ignore[index] # made so
    assert body["additionalProperties"] is False
    assert body["properties"]["kind"] == {"enum": ["Deployment"]}
    assert "status" not in body["properties"]
    assert (tmp_path / "v1" / "namespace-v1.json").is_file()


def openapi_names() -> dict[str, str]:
    """Returns kind by definition."""
    from deploy.check.vendor_schemas import KINDS

    return {name: name.rpartition(".")[2] for name in KINDS.values()}


def openapi(name: str) -> dict[str, object]:
    """Returns a definition as OpenAPI has it."""
    version = {"group": "apps", "version": "v1", "kind": openapi_names()[name]}
    properties: Tree = {"kind": {"type": "string", "description": "x"}, "metadata": {"type": "object"}, "status": {"type": "object"}}
    return {"type": "object", "properties": dict(properties), "x-kubernetes-group-version-kind": [version]}
