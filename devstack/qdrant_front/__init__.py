"""A server of Qdrant's public gRPC API over the real Qdrant engine in process, so the product knows one thing: a Qdrant address.

Single node, loopback only. What a request asks for and this server does not do is answered UNIMPLEMENTED by name, never ignored.
Searches are exact until `python -m devstack.qdrant_front.optimize` has built the indexes of a stopped server.
"""
