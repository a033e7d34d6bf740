"""The Qdrant front, over real gRPC and the real engine."""
