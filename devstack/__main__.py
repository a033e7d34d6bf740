"""`python -m devstack [run|demo|certs]`: the embedded mesh for people."""

import argparse
import asyncio
import os
import sys

import grpc

from devstack.addresses import Ports
from devstack.demo import demo
from devstack.managed_process import ProcessFailedError
from devstack.mesh_client import refusal
from devstack.run import STATE_FOLDER, run
from devstack.stack import certificates_in, is_installed


def main() -> int:
    """Runs a command; every failure is one sentence on stderr and a non-zero exit code."""
    parser = argparse.ArgumentParser(prog="python -m devstack", description=__doc__)
    parser.add_argument("command", choices=("run", "demo", "certs"))
    parser.add_argument("--json", action="store_true", help="demo: print one JSON object instead of the story")
    parser.add_argument("--tls", action="store_true", help="run, demo: every connection of the mesh on mutual TLS")
    arguments = parser.parse_args()
    if not is_installed():
        print("The packages of the embedded stack are missing: run `make install` first.", file=sys.stderr)
        return 2
    os.umask(0o077)
    try:
        if arguments.command == "certs":
            return _certs()
        if arguments.command == "run":
            asyncio.run(run(Ports(), tls=arguments.tls))
            return 0
        return asyncio.run(demo(Ports(), as_json=arguments.json, tls=arguments.tls))
    except (ProcessFailedError, ExceptionGroup) as failure:
        print(f"\n{_sentence(failure)}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever read the output has left; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except grpc.aio.AioRpcError as error:
        told = refusal(error)
        print(f"\nThe mesh refused: {told.code} {told.reason}: {told.message}", file=sys.stderr)
        return 1


def _certs() -> int:
    certificates = certificates_in(STATE_FOLDER)
    if not certificates.renew(print):
        print("every certificate is good for hours yet: nothing to do")
    print(f"they are in {certificates.folder}; what runs with TLS takes up new ones by itself")
    return 0


def _sentence(failure: Exception) -> str:
    # Parts start side by side, so one failure may come wrapped in a group. Anything but a part's own sentence is a defect and is
    # raised again with its traceback.
    first: BaseException = failure
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if not isinstance(first, ProcessFailedError):
        raise failure
    return str(first)


if __name__ == "__main__":
    sys.exit(main())
