"""Which traffic the NetworkPolicies let through, and which the code needs. The two must be equal, both ways.

Only what can be read with certainty counts: label equality, plain ports. Anything else is shown as it is and so matches nothing expected.
"""

import ipaddress
from collections.abc import Iterable, Iterator

from deploy.check.manifests import Manifests, Tree, Workload, labels, selects, text, texts, tree, trees, value
from deploy.check.mesh import Service, callers_of, port_of

Flow = tuple[str, str]

ANYONE = "anyone"
INTERNET = "internet"
CLIENTS = "namespace tenantry.dev/client=true"
DNS = "namespace kubernetes.io/metadata.name=kube-system pod k8s-app=kube-dns"
_DNS_FLOWS = frozenset({(DNS, "UDP/53"), (DNS, "TCP/53")})
_POSTGRES: Flow = ("namespace tenantry.dev/postgres=true", "TCP/5432")
# Which setting means which traffic out.
_STORES: dict[str, Flow] = {
    "postgres_dsn": _POSTGRES,
    "redis_url": ("namespace tenantry.dev/redis=true", "TCP/6379"),
    "qdrant_url": ("namespace tenantry.dev/qdrant=true", "TCP/6334"),
    "provider_base_url": (INTERNET, "TCP/443"),
}
# What a service reaches whose address no setting names: issuers' keys and tenants' receivers stand where their registration says.
_BY_SERVICE: dict[str, Flow] = {"tenant": (INTERNET, "TCP/443"), "metering": (INTERNET, "TCP/443")}
# One address of each range that is not the Internet; 169.254.169.254 hands out credentials of the node.
_PRIVATE = ("10.1.2.3", "100.64.1.1", "127.0.0.1", "169.254.169.254", "172.31.255.1", "192.168.1.1", "::1", "fd00:ec2::254", "fe80::1")


def ingress(manifests: Manifests, workload: Workload) -> frozenset[Flow]:
    """Returns what may reach the workload's pods."""
    return _allowed(manifests, workload, "ingress", "from")


def egress(manifests: Manifests, workload: Workload) -> frozenset[Flow]:
    """Returns what the workload's pods may reach."""
    return _allowed(manifests, workload, "egress", "to")


def expected_ingress(service: Service, all_edges: Iterable[tuple[str, str]], workload: Workload) -> frozenset[Flow]:
    """Returns what the contracts let in, and the kubelet's probes."""
    callers, external = callers_of(service.name, all_edges)
    port = f"TCP/{service.port}"
    flows = {(caller, port) for caller in callers} | ({(CLIENTS, port)} if external else set())
    return frozenset(flows | {(ANYONE, f"TCP/{port_of(workload.literals.get('TENANTRY_HEALTH_ADDRESS', ''))}")})


def expected_egress(
    service: Service, all_edges: Iterable[tuple[str, str]], services: dict[str, Service], workload: Workload
) -> frozenset[Flow]:
    """Returns what the service may call by the contracts, the stores its settings name, issuers and receivers."""
    flows = {(callee, f"TCP/{services[callee].port}") for caller, callee in all_edges if caller == service.name}
    flows |= {flow for field, flow in _STORES.items() if field in service.fields}
    flows |= {flow for name, flow in _BY_SERVICE.items() if name == service.name}
    endpoint = workload.literals.get("TENANTRY_OTLP_ENDPOINT", "")
    if endpoint:
        flows.add(("namespace tenantry.dev/telemetry=true", f"TCP/{port_of(endpoint)}"))
    return frozenset(flows | _DNS_FLOWS)


def expected_migration_egress() -> frozenset[Flow]:
    """Returns what a migration needs: names and Postgres."""
    return _DNS_FLOWS | {_POSTGRES}


def difference(direction: str, found: frozenset[Flow], expected: frozenset[Flow]) -> Iterator[str]:
    """Yields each flow that one side has and the other has not."""
    word = "from" if direction == "ingress" else "to"
    for peer, port in sorted(expected - found):
        yield f"{direction} {word} {peer} on {port} is needed and not allowed"
    for peer, port in sorted(found - expected):
        yield f"{direction} {word} {peer} on {port} is allowed and not needed"


def default_deny(manifests: Manifests) -> Iterator[str]:
    """Yields the absence of a policy that isolates every pod, both ways, and allows nothing."""
    for policy in manifests.of("NetworkPolicy"):
        spec = tree(policy, "spec")
        everything = "podSelector" in spec and not tree(spec, "podSelector")
        if everything and set(texts(spec, "policyTypes")) == {"Ingress", "Egress"} and not spec.keys() & {"ingress", "egress"}:
            return
    yield "no NetworkPolicy selects every pod, names Ingress and Egress, and allows nothing"


def _allowed(manifests: Manifests, workload: Workload, direction: str, side: str) -> frozenset[Flow]:
    flows: set[Flow] = set()
    for policy in manifests.of("NetworkPolicy"):
        spec = tree(policy, "spec")
        if "matchExpressions" in tree(spec, "podSelector"):
            flows.add((f"unreadable selector of {text(policy, 'metadata', 'name')}", "any"))
        elif selects(labels(spec, "podSelector", "matchLabels"), workload.labels):
            for rule in trees(spec, direction):
                flows |= {(peer, port) for peer in _peers(rule, side, manifests) for port in _ports(rule)}
    return frozenset(flows)


def _peers(rule: Tree, side: str, manifests: Manifests) -> set[str]:
    if not value(rule, side):
        return {ANYONE}
    return set().union(*(_peer(entry, manifests) for entry in trees(rule, side)))


def _peer(entry: Tree, manifests: Manifests) -> set[str]:
    if "ipBlock" in entry:
        return {_block(tree(entry, "ipBlock"))}
    namespace, pod = tree(entry, "namespaceSelector"), tree(entry, "podSelector")
    if "matchExpressions" in namespace or "matchExpressions" in pod:
        return {f"unreadable {dict(entry)}"}
    if "namespaceSelector" in entry:
        words = f"namespace {_words(namespace)}"
        return {f"{words} pod {_words(pod)}" if "podSelector" in entry else words}
    matched = {item.name for item in manifests.workloads() if selects(labels(pod, "matchLabels"), item.labels)}
    return matched or {f"nobody with {_words(pod)}"}


def _words(selector: Tree) -> str:
    return ",".join(f"{key}={label}" for key, label in sorted(labels(selector, "matchLabels").items())) or "any"


def _block(block: Tree) -> str:
    cidr = text(block, "cidr")
    try:
        network = ipaddress.ip_network(cidr)
        excepted = [ipaddress.ip_network(item) for item in texts(block, "except")]
    except ValueError as error:
        return f"unreadable addresses {error}"
    private = [address for address in map(ipaddress.ip_address, _PRIVATE) if address.version == network.version]
    closed = all(any(address in hole for hole in excepted) for address in private)
    return INTERNET if network.prefixlen == 0 and closed else f"addresses {cidr}"


def _ports(rule: Tree) -> set[str]:
    entries = trees(rule, "ports")
    if not entries:
        return {"any"}
    ends = ((item, f"-{text(item, 'endPort')}" if "endPort" in item else "") for item in entries)
    return {f"{text(item, 'protocol') or 'TCP'}/{text(item, 'port') or 'any'}{end}" for item, end in ends}
