"""Qdrant's own health check, which also says what is serving. The standard gRPC health service is the stock one."""

from importlib.metadata import version

from qdrant_client import grpc as q

from .call import Context


class Health(q.QdrantServicer):
    """Serves `qdrant.Qdrant`: the version is that of the API spoken, the title carries the engine's."""

    async def HealthCheck(self, request: q.HealthCheckRequest, context: Context) -> q.HealthCheckReply:
        """Answer without a key."""
        title = f"qdrant - vector search engine (edge {version('qdrant-edge-py')})"
        return q.HealthCheckReply(title=title, version=version("qdrant-client"))
