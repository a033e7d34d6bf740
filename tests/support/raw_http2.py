"""A gRPC call written byte by byte over HTTP/2, for metadata that a well-behaved client refuses to send."""

import asyncio

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, ResponseReceived, StreamEnded, StreamReset, TrailersReceived

Headers = list[tuple[bytes, bytes]]


async def raw_unary(port: int, path: str, body: bytes, metadata: Headers) -> dict[bytes, bytes]:
    """Makes one unary call with metadata exactly as given; returns the answer's headers and trailers together."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    # Outbound validation off: sending what must not be sent is the point.
    connection = H2Connection(
        H2Configuration(client_side=True, header_encoding=None, validate_outbound_headers=False, normalize_outbound_headers=False)
    )
    connection.initiate_connection()
    head = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
    ]
    connection.send_headers(1, head + metadata)
    connection.send_data(1, b"\x00" + len(body).to_bytes(4, "big") + body, end_stream=True)
    writer.write(connection.data_to_send())
    answer: dict[bytes, bytes] = {}
    ended = False
    while not ended:
        received = await asyncio.wait_for(reader.read(65536), 10)
        if not received:
            break
        for event in connection.receive_data(received):
            if isinstance(event, ResponseReceived | TrailersReceived):
                answer.update(dict(event.headers))
            elif isinstance(event, DataReceived):
                connection.acknowledge_received_data(event.flow_controlled_length, 1)
            ended = ended or isinstance(event, StreamEnded | StreamReset)
        writer.write(connection.data_to_send())
    writer.close()
    await writer.wait_closed()
    return answer
