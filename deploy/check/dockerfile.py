"""What can be said of the image without building it: pinned base, locked dependencies, sources that exist, a user that is not root."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_CONTINUED = re.compile(r"\\\n")
_VERSION_TAG = re.compile(r"\d+\.\d+\.\d+")
_BUILD_TOOLS = re.compile(r"\b(apt-get install|apk add|build-essential|gcc|uv pip install)\b")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction, such as COPY, and what follows it."""

    name: str
    arguments: str


def parse(source: str) -> list[list[Instruction]]:
    """Returns the instructions of each stage; what stands before the first FROM is dropped."""
    stages: list[list[Instruction]] = []
    for line in _CONTINUED.sub(" ", source).splitlines():
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, _, arguments = line.strip().partition(" ")
        if name.upper() == "FROM":
            stages.append([])
        if stages:
            stages[-1].append(Instruction(name.upper(), arguments.strip()))
    return stages


def problems(source: str, ignored: str, context: Path) -> Iterator[str]:
    """Yields what is wrong with a Dockerfile and its .dockerignore, whose build context is `context`."""
    stages = parse(source)
    if len(stages) < 2:
        yield "there is one stage: build tools would be in the image"
        return
    names = {words[2] for stage in stages if len(words := stage[0].arguments.split()) == 3}
    for stage in stages:
        yield from _base(stage[0].arguments.split()[0], names)
        yield from _sources(stage, context, names, _kept(ignored))
    yield from _last_stage(stages[-1])
    if not any("--require-hashes" in item.arguments for stage in stages for item in stage if item.name == "RUN"):
        yield "dependencies are installed without --require-hashes"


def _base(image: str, stages: set[str]) -> Iterator[str]:
    tag = image.partition(":")[2]
    if image not in stages and not _VERSION_TAG.match(tag):
        yield f"base image {image} is not pinned to a full version"


def _kept(ignored: str) -> set[str]:
    # The file leaves out everything and names what stays, so that no secret of a checkout gets into a layer.
    lines = [line.strip() for line in ignored.splitlines()]
    return {line.removeprefix("!") for line in lines if line.startswith("!")} if "*" in lines else set()


def _sources(stage: list[Instruction], context: Path, stages: set[str], kept: set[str]) -> Iterator[str]:
    for item in stage:
        if item.name == "ADD":
            yield "ADD unpacks and downloads: use COPY"
        if item.name != "COPY":
            continue
        words = item.arguments.split()
        flags = [word for word in words if word.startswith("--")]
        origin = next((flag.removeprefix("--from=") for flag in flags if flag.startswith("--from=")), None)
        if origin is not None:
            if origin not in stages:
                yield f"COPY --from={origin} names no stage"
            continue
        for path in [word for word in words if not word.startswith("--")][:-1]:
            if not (context / path).exists():
                yield f"COPY source {path} does not exist"
            elif not any(path == item or path.startswith(f"{item}/") for item in kept):
                yield f"COPY source {path} is kept out by the .dockerignore, or everything else is not"


def _last_stage(stage: list[Instruction]) -> Iterator[str]:
    users = [item.arguments for item in stage if item.name == "USER"]
    user = users[-1].partition(":")[0] if users else ""
    if not user.isdecimal() or int(user) == 0:
        yield f"the image runs as {user or 'root'}: name a numeric user that is not 0"
    if not any(item.name == "ENTRYPOINT" and item.arguments.startswith("[") for item in stage):
        yield "ENTRYPOINT is missing or runs in a shell, which would swallow SIGTERM"
    for item in stage:
        if item.name == "RUN" and _BUILD_TOOLS.search(item.arguments):
            yield f"the last stage installs: {item.arguments[:60]}"
