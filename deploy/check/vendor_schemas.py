"""Makes the strict JSON schemas in `schemas/` from the OpenAPI of published `k8s.io/kubernetes` Go modules.

Run by hand, with Go, when a kind or a Kubernetes version is added: `python -m deploy.check.vendor_schemas v1.31.14 v1.36.3`.
Only the kinds in `KINDS` get a schema: every other kind is refused by the check.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

SCHEMAS = Path(__file__).parent / "schemas"
# Secret is missing on purpose: the manifests name Secrets and never contain one.
KINDS = {
    "namespace-v1": "io.k8s.api.core.v1.Namespace",
    "service-v1": "io.k8s.api.core.v1.Service",
    "serviceaccount-v1": "io.k8s.api.core.v1.ServiceAccount",
    "deployment-apps-v1": "io.k8s.api.apps.v1.Deployment",
    "job-batch-v1": "io.k8s.api.batch.v1.Job",
    "networkpolicy-networking-v1": "io.k8s.api.networking.v1.NetworkPolicy",
    "poddisruptionbudget-policy-v1": "io.k8s.api.policy.v1.PodDisruptionBudget",
}
_REFERENCE = "#/definitions/"
_KEPT = ("type", "required", "format", "enum")
# Texts in OpenAPI, numbers in many a manifest: the API server takes both.
_LOOSE: dict[str, dict[str, object]] = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"type": ["string", "number"]},
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"type": ["string", "integer"]},
}

Schema = dict[str, object]


def main(versions: list[str]) -> int:
    """Writes one directory a version, and which modules they came from."""
    if not versions:
        sys.stderr.write("usage: python -m deploy.check.vendor_schemas v1.31.14 [v1.36.3 …]\n")
        return 2
    for old in SCHEMAS.glob("v*"):
        shutil.rmtree(old)
    sources = []
    for version in versions:
        module = _download(version)
        openapi = json.loads((Path(str(module["Dir"])) / "api" / "openapi-spec" / "swagger.json").read_text())
        write(strict_schemas(openapi["definitions"]), SCHEMAS / version)
        sources.append({"module": module["Path"], "version": version, "sum": module["Sum"]})
    (SCHEMAS / "sources.json").write_text(json.dumps(sources, indent=2) + "\n")
    return 0


def strict_schemas(definitions: dict[str, Schema]) -> dict[str, Schema]:
    """Returns one schema a kind, each with the definitions it needs, refusing unknown fields and a status."""
    schemas: dict[str, Schema] = {}
    for file_name, root in KINDS.items():
        needed: dict[str, Schema] = {}
        _collect(root, definitions, needed)
        schemas[file_name] = {"$ref": _REFERENCE + root, "definitions": dict(sorted(needed.items()))}
        _pin_root(needed[root], definitions[root])
    return schemas


def write(schemas: dict[str, Schema], directory: Path) -> None:
    """Writes the schemas, compact but a line a definition."""
    directory.mkdir(parents=True)
    for file_name, schema in schemas.items():
        definitions = schema["definitions"]
        assert isinstance(definitions, dict)  # noqa: S101 - made so above
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(body, sort_keys=True)}" for name, body in definitions.items())
        (directory / f"{file_name}.json").write_text(f'{{"$ref": {json.dumps(schema["$ref"])}, "definitions": {{\n{lines}\n}}}}\n')


def _download(version: str) -> dict[str, object]:
    command = ["go", "mod", "download", "-json", f"k8s.io/kubernetes@{version}"]
    answer: dict[str, object] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603 - no shell
    return answer


def _collect(name: str, definitions: dict[str, Schema], needed: dict[str, Schema]) -> None:
    if name in needed:
        return
    needed[name] = _LOOSE.get(name) or _strict(definitions[name])
    for reference in sorted(_references(needed[name])):
        _collect(reference, definitions, needed)


def _strict(source: Schema) -> Schema:
    strict: Schema = {key: source[key] for key in _KEPT if key in source}
    if "$ref" in source:
        strict["$ref"] = source["$ref"]
    properties = source.get("properties")
    if isinstance(properties, dict):
        strict["properties"] = {name: _strict(value) for name, value in properties.items()}
        strict["additionalProperties"] = False
    for key in ("items", "additionalProperties"):
        inner = source.get(key)
        if isinstance(inner, dict):
            strict[key] = _strict(inner)
    return strict


def _pin_root(schema: Schema, source: Schema) -> None:
    kinds = source["x-kubernetes-group-version-kind"]
    properties = schema["properties"]
    assert isinstance(kinds, list) and isinstance(properties, dict)  # noqa: S101 - the form of every kind in OpenAPI
    group, version, kind = (kinds[0][key] for key in ("group", "version", "kind"))
    properties.pop("status", None)
    properties["apiVersion"] = {"enum": [f"{group}/{version}" if group else version]}
    properties["kind"] = {"enum": [kind]}
    schema["required"] = sorted({"apiVersion", "kind", "metadata", *([] if kind in ("Namespace", "ServiceAccount") else ["spec"])})


def _references(value: object) -> set[str]:
    if isinstance(value, dict):
        own = {str(value["$ref"]).removeprefix(_REFERENCE)} if isinstance(value.get("$ref"), str) else set()
        return own.union(*(_references(item) for item in value.values()))
    if isinstance(value, list):
        return set().union(*(_references(item) for item in value))
    return set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
