"""Ways of spoiling the manifests, each with the check that must notice."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Spoiling:
    """A text replaced in one file, the check that must turn red, and what it must say."""

    file: str
    old: str
    new: str
    check: str
    says: str


INFERENCE, RATELIMIT, JOBS, POD = "base/inference.yaml", "base/ratelimit.yaml", "base/migrations.yaml", "base/patches/deployment.yaml"
SPOILINGS = {
    "container port": Spoiling(
        INFERENCE, "containerPort: 7403", "containerPort: 7499", "inference: ports are", "container port grpc is 7499"
    ),
    "listen port": Spoiling(RATELIMIT, "0.0.0.0:7402", "0.0.0.0:7499", "ratelimit: ports are", "TENANTRY_LISTEN_ADDRESS has port 7499"),
    "Service port": Spoiling(INFERENCE, "port: 7403\n      targetPort", "port: 7499\n      targetPort", "inference: headless", "7499"),
    "probed port": Spoiling(
        POD,
        "port: 8080\n            periodSeconds: 10",
        "port: 8081\n            periodSeconds: 10",
        "probes",
        "livenessProbe asks port 8081",
    ),
    "probed service": Spoiling(
        INFERENCE,
        "service: mesh.inference.v1.InferenceService",
        "service: mesh.inference.v1.Inference",
        "inference: probes",
        "does not register",
    ),
    "probe left out": Spoiling(POD, "startupProbe:", "xProbe:", "valid in Kubernetes v1.36.3", "'xProbe' not allowed"),
    "environment name": Spoiling(POD, "TENANTRY_LOG_LEVEL", "TENANTRY_LOGLEVEL", "environment names", "TENANTRY_LOGLEVEL is no setting"),
    "environment name left out": Spoiling(
        RATELIMIT, "TENANTRY_REDIS_URL", "REDIS_URL", "ratelimit: required settings", "TENANTRY_REDIS_URL is not set"
    ),
    "peer's address": Spoiling(
        INFERENCE,
        "dns:///metering.tenantry.svc.cluster.local:7405",
        "dns:///metering.tenantry.svc.cluster.local:7404",
        "inference: peers",
        "METERING_ADDRESS",
    ),
    "TLS left out": Spoiling(POD, "TENANTRY_TLS", "OTHER_TLS", "settings accept the environment", "is not loopback"),
    "other service's certificate": Spoiling(
        INFERENCE, "secretName: inference-tls", "secretName: tenant-tls", "inference: certificates", "Secret inference-tls"
    ),
    "secret as text": Spoiling(
        INFERENCE,
        "valueFrom:\n                secretKeyRef:\n                  name: inference-settings\n                  key: anthropic-api-key",
        "value: sk-plain",
        "inference: secrets are named",
        "TENANTRY_ANTHROPIC_API_KEY is written in the manifest",
    ),
    "admin connection in a service": Spoiling(
        INFERENCE,
        "TENANTRY_POSTGRES_DSN",
        "TENANTRY_POSTGRES_ADMIN_DSN",
        "inference: secrets are named",
        "does not belong in a Deployment",
    ),
    "service account": Spoiling(
        INFERENCE,
        "serviceAccountName: inference",
        "serviceAccountName: default",
        "inference: service account",
        "ServiceAccount default is not",
    ),
    "token mounted": Spoiling(
        POD, "automountServiceAccountToken: false", "automountServiceAccountToken: true", "service account", "token is mounted"
    ),
    "kind": Spoiling(
        INFERENCE, "kind: PodDisruptionBudget", "kind: PodDisruptionBudge", "valid in Kubernetes v1.31.14", "PodDisruptionBudge"
    ),
    "field": Spoiling(INFERENCE, "replicas: 2", "replicass: 2", "valid in Kubernetes v1.36.3", "'replicass' not allowed"),
    "type of a field": Spoiling(POD, "runAsGroup: 65532", "runAsGroup: staff", "valid in Kubernetes v1.31.14", "want integer"),
    "edge added": Spoiling(
        "base/retrieval.yaml",
        "app.kubernetes.io/name: inference",
        "app.kubernetes.io/name: metering",
        "retrieval: ingress",
        "ingress from metering on TCP/7404 is allowed and not needed",
    ),
    "edge left out": Spoiling(
        "base/retrieval.yaml",
        "app.kubernetes.io/name: inference",
        "app.kubernetes.io/name: metering",
        "retrieval: ingress",
        "ingress from inference on TCP/7404 is needed and not allowed",
    ),
    "way out to everything": Spoiling(
        "base/network.yaml",
        'tenantry.dev/telemetry: "true"',
        'tenantry.dev/anything: "true"',
        "tenant: egress",
        "egress to namespace tenantry.dev/anything=true on TCP/4317",
    ),
    "provider's way out reaches the node": Spoiling(
        INFERENCE, "169.254.0.0/16, ", "", "inference: egress", "egress to addresses 0.0.0.0/0"
    ),
    "default deny": Spoiling(
        "base/network.yaml",
        "policyTypes: [Ingress, Egress]",
        "policyTypes: [Ingress]",
        "default-deny",
        "no NetworkPolicy selects every pod",
    ),
    "grace period": Spoiling(
        INFERENCE,
        "terminationGracePeriodSeconds: 180",
        "terminationGracePeriodSeconds: 160",
        "inference: a pod's end",
        "is 160, ending takes up to 170 s",
    ),
    "drain": Spoiling(INFERENCE, 'value: "150"', 'value: "100"', "inference: a pod's end", "a call may take 120 s"),
    "tag": Spoiling("base/kustomization.yaml", "newTag: 0.1.0", "newTag: latest", "image has a fixed tag", "has no fixed tag"),
    "limits": Spoiling(INFERENCE, "              memory: 768Mi\n", "", "inference: requests and limits", "no memory in limits"),
    "writable root": Spoiling(POD, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "restricted", "may write its root"),
    "capabilities": Spoiling(POD, "drop: [ALL]", "drop: [NET_RAW]", "restricted", "drop ALL"),
    "root": Spoiling(POD, "runAsUser: 65532", "runAsUser: 0", "restricted", "may run as root"),
    "disruption budget": Spoiling(
        INFERENCE,
        "Allow\n  selector:\n    matchLabels:\n      app.kubernetes.io/name: inf",
        "Allow\n  selector:\n    matchLabels:\n      app.kubernetes.io/name: no",
        "inference: disruption",
        "exactly the service's pods",
    ),
    "headless": Spoiling(INFERENCE, "  clusterIP: None\n", "", "inference: headless", "is not headless"),
    "replicas": Spoiling(INFERENCE, "replicas: 2", "replicas: 1", "inference: replicas", "fewer than 2"),
    "spread": Spoiling(
        INFERENCE,
        "topologyKey: kubernetes.io/hostname",
        "topologyKey: kubernetes.io/os",
        "inference: pods are spread",
        "not spread over nodes",
    ),
    "migration's connection": Spoiling(
        JOBS,
        "TENANTRY_POSTGRES_ADMIN_DSN",
        "TENANTRY_POSTGRES_ADMIN",
        "tenant-migration: required settings",
        "TENANTRY_POSTGRES_ADMIN_DSN is not set",
    ),
    "migration's way out": Spoiling(JOBS, "port: 5432", "port: 6379", "tenant-migration: only Postgres", "TCP/5432 is needed"),
    "a file left out": Spoiling(
        "base/kustomization.yaml", "  - metering.yaml\n", "", "every service is deployed", "no Deployment metering"
    ),
    "a file that is not there": Spoiling("base/kustomization.yaml", "metering.yaml", "meter.yaml", "kustomize builds it", "meter.yaml"),
}
