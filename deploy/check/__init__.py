"""Holds the manifests against Kubernetes' schemas and against the code: `python -m deploy.check`."""
