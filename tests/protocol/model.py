"""The call protocol as a state machine: every step each party may take from a state, and what must hold.

Four parties: I (an inference replica, forgets everything when killed), R (reservations in Redis, may lose all its data), M (the ledger in
Postgres, durable), P (the provider). A message once sent may be delivered at any later moment, any number of times, in any order.
"""

from __future__ import annotations

from collections.abc import Callable

from tests.protocol.extension import asks_for_more, extend_at_ledger, extend_at_limits
from tests.protocol.world import EXTENDED, HOLD, Message, Protocol, State, Steps, holds, put, replica


def successors(s: State, x: Protocol) -> Steps:
    """Every step possible from `s`."""
    for c in range(x.calls):
        yield from _replica_before_open(s, c, x)
        yield from _replica_after_open(s, c)
        yield from asks_for_more(s, c, x)
        yield from _provider(s, c)
        yield from _time(s, c, x)
    for message in s.net:
        yield from _DELIVERIES.get(message.kind, _for_the_replica)(s, message, x)
    if s.flushes < x.flushes:
        yield "R loses its data", _emptied(s)._replace(flushes=s.flushes + 1), False
    if s.r_epoch < 0:
        yield "R asks M for a snapshot", s._replace(net=s.net | {Message("rebuild", nonce=s.r_nonce)}), True


def _emptied(s: State) -> State:
    return s._replace(r=("none",) * len(s.r), r_hold=(0,) * len(s.r), r_epoch=-1, r_used=0, r_nonce=s.r_nonce + 1)


def _replica_before_open(s: State, c: int, x: Protocol) -> Steps:
    release = Message("release", c, s.i_epoch[c])
    match s.i[c]:
        case "none":
            yield f"I{c} sends Reserve", replica(s, c, "reserving", Message("reserve", c)), True
        case "reserving":
            yield from _replica_reserved(s, c, x)
        case "opening":
            if Message("open_ok", c) in s.net:
                yield f"I{c} sees Open acknowledged", replica(s, c, "ready"), True
            if Message("open_refused", c) in s.net:
                yield f"I{c} sees Open refused", replica(s, c, "done", release), True
            if x.rules.void_before_release:
                yield f"I{c} gives up, sends Void", replica(s, c, "giving_up", Message("void", c)), False
            else:
                yield f"I{c} gives up, sends Release", replica(s, c, "done", release), False
        case "giving_up" if Message("void_ok", c) in s.net:
            yield f"I{c} releases after Void", replica(s, c, "done", release), True


def _replica_reserved(s: State, c: int, x: Protocol) -> Steps:
    for m in s.net:
        if m.kind == "reserve_ok" and m.call == c:
            reserved = s._replace(i_epoch=put(s.i_epoch, c, m.epoch))
            opening = Message("open", c, m.epoch)
            if x.rules.open_before_dispatch:
                yield f"I{c} sends Open", replica(reserved, c, "opening", opening), True
            else:
                sent = replica(reserved, c, "dispatched", opening)
                yield f"I{c} dispatches without Open", sent._replace(p_sent=put(s.p_sent, c, True)), True
            yield f"I{c} cancels before Open", replica(reserved, c, "done", Message("release", c, m.epoch)), False
    if Message("refused", c) in s.net:
        yield f"I{c} is refused", replica(s, c, "done"), True


def _replica_after_open(s: State, c: int) -> Steps:
    i = s.i[c]
    match i:
        case "ready":
            yield f"I{c} dispatches", replica(s, c, "dispatched")._replace(p_sent=put(s.p_sent, c, True)), True
        case "dispatched" | "asking" | "raising":
            if s.p[c]:
                yield f"I{c} receives the reply", replica(s, c, "replied", Message("settle", c, amount=s.p[c])), True
            yield f"I{c} cannot learn the usage, sends Interrupt", replica(s, c, "interrupting", Message("interrupt", c)), False
        case "interrupting" if Message("interrupt_ok", c) in s.net:
            yield f"I{c} sees Interrupt acknowledged", replica(s, c, "done"), True
        case "replied" if Message("settle_ok", c) in s.net:
            yield f"I{c} sees Settle acknowledged", replica(s, c, "done"), True
    if i not in ("none", "done", "dead"):
        yield f"I{c} is killed", replica(s, c, "dead"), False


def _provider(s: State, c: int) -> Steps:
    if s.p_sent[c] and not s.p[c]:
        for amount in range(1, s.p_cap[c] + 1):
            yield f"P bills {amount} for call {c}", s._replace(p=put(s.p, c, amount), p_sent=put(s.p_sent, c, False)), True


def _time(s: State, c: int, x: Protocol) -> Steps:
    """Clocks are not modelled: a lease may end, and a message grow too old, at any moment, even of a live holder."""
    if s.r_epoch >= 0 and s.r[c] == "held":
        if x.rules.fence_on_expiry:
            asked = s._replace(net=s.net | {Message("fence", c, s.r_epoch)})
            yield f"R: lease of call {c} ends, asks M", asked, s.i[c] in ("done", "dead")
        else:
            yield f"R: lease of call {c} ends, lets go", _ended(s, c, "released"), s.i[c] in ("done", "dead")
    if s.m[c] == "open":
        yield f"M: lease of call {c} ends, unresolved", _unresolved(s, c, x), False
    if s.i[c] != "none" and not s.expired[c]:
        yield f"Reserve of call {c} expires", s._replace(expired=put(s.expired, c, True)), False
    may_forget = s.expired[c] or not x.rules.forget_only_after_reserve_expired
    if s.r[c] in ("committed", "released") and may_forget:
        yield f"R forgets call {c}", s._replace(r=put(s.r, c, "none")), False


def _unresolved(s: State, c: int, x: Protocol) -> State:
    told = {Message("pin", c, s.m_epoch)} if x.choices.unresolved_told_by_outbox else set()
    return s._replace(m=put(s.m, c, "unresolved"), net=s.net | told)


def _ended(s: State, c: int, state: str) -> State:
    return s._replace(r=put(s.r, c, state), r_hold=put(s.r_hold, c, 0))


def _for_the_replica(s: State, m: Message, x: Protocol) -> Steps:
    """Answers stay readable on the wire: the replica's own steps take them."""
    yield from ()


def _reserve(s: State, m: Message, x: Protocol) -> Steps:
    c = m.call
    if s.r_epoch < 0:
        return
    room = s.r_used + holds(s) + HOLD <= x.limit
    answer = Message("reserve_ok", c, s.r_epoch)
    if not s.expired[c] and s.r[c] == "none" and room:
        yield f"R holds for call {c}", _held(s, c, answer), True
    elif not s.expired[c] and s.r[c] in ("held", "pinned"):
        yield f"R repeats its answer for call {c}", s._replace(net=s.net | {answer}), True
    elif (s.expired[c] or s.r[c] == "none") and s.i[c] == "reserving":
        yield f"R refuses call {c}", s._replace(net=s.net | {Message("refused", c)}), True


def _held(s: State, c: int, answer: Message) -> State:
    return s._replace(r=put(s.r, c, "held"), r_hold=put(s.r_hold, c, HOLD), net=s.net | {answer})


def _release(s: State, m: Message, x: Protocol) -> Steps:
    if s.r_epoch == m.epoch and s.r[m.call] == "held":
        yield f"R releases call {m.call}", _ended(s, m.call, "released"), True


def _open(s: State, m: Message, x: Protocol) -> Steps:
    c, now = m.call, s.m[m.call]
    stale = x.rules.epoch_checked_on_open and m.epoch < s.m_epoch
    acknowledged = Message("open_ok", c) in s.net and (x.rules.repeated_open_is_acknowledged or now == "void")
    if now == "none" and not stale:
        yield f"M opens call {c}", s._replace(m=put(s.m, c, "open"), net=s.net | {Message("open_ok", c)}), True
    elif (now in ("void", "unresolved") or (now == "none" and stale)) and not acknowledged:
        yield f"M refuses Open of call {c}", s._replace(net=s.net | {Message("open_refused", c)}), True


def _void(s: State, m: Message, x: Protocol) -> Steps:
    c, answer = m.call, Message("void_ok", m.call)
    if s.m[c] in ("none", "open", "unresolved"):
        told = {Message("commit", c, s.m_epoch)} if x.rules.void_told_by_outbox else set()
        yield f"M voids call {c}", s._replace(m=put(s.m, c, "void"), net=s.net | {answer} | told), True
    elif s.m[c] == "void":
        yield f"M repeats that call {c} is void", s._replace(net=s.net | {answer}), True


def _interrupt(s: State, m: Message, x: Protocol) -> Steps:
    c, answer = m.call, Message("interrupt_ok", m.call)
    if s.m[c] == "open":
        nxt = _unresolved(s, c, x)
        yield f"M marks call {c} unresolved", nxt._replace(net=nxt.net | {answer}), True
    else:
        yield f"M acknowledges Interrupt of call {c}, {s.m[c]} already", s._replace(net=s.net | {answer}), True


def _settle(s: State, m: Message, x: Protocol) -> Steps:
    c = m.call
    if s.m[c] in ("open", "unresolved"):
        told = {Message("settle_ok", c), Message("commit", c, s.m_epoch, m.amount)}
        yield f"M settles call {c}", s._replace(m=put(s.m, c, "settled"), net=s.net | told), True


def _commit(s: State, m: Message, x: Protocol) -> Steps:
    c = m.call
    committed = _ended(s, c, "committed")._replace(r_used=s.r_used + m.amount)
    if s.r_epoch < 0:
        return
    if not x.rules.epoch_checked_on_commit:
        if s.r[c] != "committed":
            yield f"R commits call {c} without looking at the epoch", committed, True
    elif m.epoch == s.r_epoch and s.r[c] in ("held", "pinned"):
        yield f"R commits {m.amount} for call {c}", committed, True
    elif m.epoch > s.r_epoch and x.rules.newer_epoch_means_rebuild:
        yield "R meets a newer epoch, starts over", _emptied(s), True


def _pin(s: State, m: Message, x: Protocol) -> Steps:
    c = m.call
    if s.r_epoch < 0:
        return
    if s.r[c] == "held" and (m.epoch == s.r_epoch or not x.rules.epoch_checked_on_pin):
        yield f"R is told, pins call {c}", s._replace(r=put(s.r, c, "pinned")), True
    elif m.epoch > s.r_epoch and x.rules.newer_epoch_means_rebuild:
        yield "R meets a newer epoch, starts over", _emptied(s), True


def _fence(s: State, m: Message, x: Protocol) -> Steps:
    c, says, nxt = m.call, s.m[m.call], s
    if says == "none":
        says = "void"
        nxt = s._replace(m=put(s.m, c, "void")) if x.rules.fence_leaves_tombstone else s
    elif says == "open":
        says, nxt = "unresolved", _unresolved(s, c, x)
    elif says == "settled" and x.rules.fence_dates_the_settlement:
        dated = [y.epoch for y in s.net if y.kind == "commit" and y.call == c]
        says = "settled_before" if all(epoch < m.epoch for epoch in dated) else says
    answer = Message("fenced", c, m.epoch, says=says)
    if answer not in s.net:
        yield f"M answers: call {c} is {says}", nxt._replace(net=nxt.net | {answer}), True


def _fenced(s: State, m: Message, x: Protocol) -> Steps:
    c = m.call
    if s.r_epoch != m.epoch or s.r[c] != "held":
        return
    if m.says in ("void", "settled_before"):
        yield f"R lets go of call {c}", _ended(s, c, "released"), True
    elif m.says == "unresolved":
        yield f"R pins call {c}", s._replace(r=put(s.r, c, "pinned")), True


def _rebuild(s: State, m: Message, x: Protocol) -> Steps:
    if any(y.kind == "snapshot" and y.nonce == m.nonce for y in s.net):
        return
    known = {"open": "held", "unresolved": "pinned" if x.choices.unresolved_loaded_pinned else "held"}
    loads = tuple(known.get(now, "none") if x.rules.rebuild_counts_open_calls else "none" for now in s.m)
    known_bounds = s.m_bound if x.rules.extension_in_snapshot else (HOLD,) * len(s.m)
    bounds = tuple(0 if state == "none" else bound for bound, state in zip(known_bounds, loads, strict=True))
    used = sum(billed for billed, now in zip(s.p, s.m, strict=True) if now == "settled")
    answer = Message("snapshot", epoch=s.m_epoch + 1, amount=used, nonce=m.nonce, loads=loads, bounds=bounds)
    yield "M begins an epoch, sends a snapshot", s._replace(m_epoch=s.m_epoch + 1, net=s.net | {answer}), True


def _snapshot(s: State, m: Message, x: Protocol) -> Steps:
    if s.r_epoch < 0 and (m.nonce == s.r_nonce or not x.rules.rebuild_answers_own_request):
        loaded = s._replace(r=m.loads, r_hold=m.bounds, r_epoch=m.epoch, r_used=m.amount)
        yield f"R loads the snapshot of epoch {m.epoch}", loaded, True


_DELIVERIES: dict[str, Callable[[State, Message, Protocol], Steps]] = {
    "reserve": _reserve,
    "release": _release,
    "extend": extend_at_limits,
    "open": _open,
    "raise": extend_at_ledger,
    "void": _void,
    "interrupt": _interrupt,
    "settle": _settle,
    "commit": _commit,
    "pin": _pin,
    "fence": _fence,
    "fenced": _fenced,
    "rebuild": _rebuild,
    "snapshot": _snapshot,
}


def violation(s: State, at_rest: bool, limit: int) -> str | None:
    """Name the first invariant broken in `s`; at rest nothing that must happen is left to happen."""
    if sum(s.p) > limit:
        return f"invariant 1: billed {sum(s.p)} of a budget of {limit}"
    if not at_rest:
        return None
    for c, billed in enumerate(s.p):
        if billed and s.m[c] not in ("settled", "unresolved"):
            return f"invariant 2: call {c} was billed {billed}, the ledger says {s.m[c]}"
        if s.m[c] == "unresolved" and billed > s.m_bound[c]:
            return f"invariant 2: call {c} was billed {billed}, the ledger holds it at {s.m_bound[c]}"
        if s.m[c] == "settled" and not billed:
            return f"invariant 4: call {c} settled but never billed"
    settled = sum(billed for billed, now in zip(s.p, s.m, strict=True) if now == "settled")
    unresolved = tuple(bound if now == "unresolved" else 0 for bound, now in zip(s.m_bound, s.m, strict=True))
    # More than the bound only of a call R was asked to hold more for and M was not, or too late: its end lets go of it.
    rightly = all(hold == bound or EXTENDED == hold > bound > 0 for hold, bound in zip(s.r_hold, unresolved, strict=True))
    if s.r_used != settled or not rightly:
        return f"invariant 3: R has used={s.r_used} held={s.r_hold}, the ledger settled={settled} unresolved={unresolved}"
    return None
