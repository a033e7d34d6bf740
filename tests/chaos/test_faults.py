"""A storm fails by an INTERNAL answer, and by what a service logged with a traceback."""

import json
from pathlib import Path

import grpc

from devstack.stack import START_ORDER
from mesh.common.v1 import error_reason_pb2
from services.kernel.errors import MeshError, Unavailable
from services.kernel.rpc.wire_status import DETAILS_KEY, encode
from tests.chaos.faults import Faults, logged


def answered(error: MeshError) -> grpc.aio.AioRpcError:
    """What a caller gets to see of it."""
    return grpc.aio.AioRpcError(error.code, grpc.aio.Metadata(), grpc.aio.Metadata((DETAILS_KEY, encode(error))), error.message)


def test_an_internal_answer_is_kept_with_its_method_and_what_it_was_about() -> None:
    """By its code or by its reason alone; what tells a caller to come again is none."""
    faults, internal = Faults(), error_reason_pb2.ERROR_REASON_INTERNAL
    for code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        assert faults.read("Generate", "call 1", answered(MeshError(code, internal, "trace 7"))).reason == "INTERNAL"
    assert faults.read("Generate", "call 2", answered(Unavailable("redis"))).code == "UNAVAILABLE"
    assert faults.said == [f"Generate of call 1 was answered {code} INTERNAL: trace 7 {{}}" for code in ("INTERNAL", "UNKNOWN")]


def test_a_logged_traceback_is_a_fault_and_a_warning_is_none(tmp_path: Path) -> None:
    """Whether the line is a whole record or was cut by a kill."""
    exception = "Traceback (most recent call last):\n  File …\nValueError: no"
    crashed = json.dumps({"event": "background_loop_crashed", "loop": "sweep", "level": "error", "exception": exception})
    warned = json.dumps({"event": "redis_unreachable", "level": "warning"})
    for service in START_ORDER:
        (tmp_path / f"{service}.log").write_text(f"{warned}\n")
    (tmp_path / "ratelimit.log").write_text(f"{warned}\n{crashed}\n{crashed[:-20]}\n")
    whole, cut = logged(tmp_path)
    assert whole == "ratelimit logged background_loop_crashed sweep: ValueError: no"
    assert cut.startswith('ratelimit logged {"event"')
