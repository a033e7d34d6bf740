"""One trace as an indented tree with durations, for a terminal."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from devstack.trace_receiver import Span

NANOSECONDS_PER_MILLISECOND = 1_000_000


def render(spans: Iterable[Span]) -> Iterator[str]:
    """Yields a line a span: indentation by parent, service, name and duration in milliseconds.

    A span whose parent is unknown is a root.
    """
    known = {span.span_id: span for span in spans}
    children: dict[str, list[Span]] = defaultdict(list)
    for span in known.values():
        children[span.parent_span_id if span.parent_span_id in known else ""].append(span)
    yield from _lines(children, "", 0)


def _lines(children: dict[str, list[Span]], parent: str, depth: int) -> Iterator[str]:
    for span in sorted(children.get(parent, ()), key=lambda child: child.start_ns):
        milliseconds = (span.end_ns - span.start_ns) / NANOSECONDS_PER_MILLISECOND
        mark = " !" if span.error else ""
        yield f"{'  ' * depth}{span.service:<10} {span.name}{mark}  {milliseconds:.1f} ms"
        yield from _lines(children, span.span_id, depth + 1)
