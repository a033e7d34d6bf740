"""Extending a call under way, step by step: R holds more, then M records the raised bound, and only then is more used.

Refused by either, or unanswered, the call stays within what it had.
"""

from __future__ import annotations

from tests.protocol.world import EXTENDED, Message, Protocol, State, Steps, holds, put, replica


def asks_for_more(s: State, c: int, x: Protocol) -> Steps:
    """What the replica of a dispatched call may do about more than it holds."""
    asked, told = s._replace(extensions=s.extensions - 1), Message("raise", c, s.i_epoch[c])
    match s.i[c]:
        case "dispatched" if s.extensions and x.rules.extension_held_first:
            yield f"I{c} asks R for more", replica(asked, c, "asking", Message("extend", c, s.i_epoch[c])), False
        case "dispatched" if s.extensions:
            yield f"I{c} asks M for more, and R not at all", replica(asked, c, "raising", told), False
        case "asking":
            if Message("extend_ok", c, s.i_epoch[c]) in s.net:
                yield from _more_is_held(s, c, told, x)
            if Message("extend_refused", c) in s.net:
                yield f"I{c} sees that R holds no more", replica(s, c, "dispatched"), True
            yield f"I{c} waits for R no longer", replica(s, c, "dispatched"), False
        case "raising":
            if Message("raise_ok", c) in s.net:
                yield f"I{c} sees the bound raised, goes on", _goes_on(replica(s, c, "dispatched"), c), True
            if Message("raise_refused", c) in s.net:
                yield f"I{c} sees that M raises no bound", replica(s, c, "dispatched"), True
            yield f"I{c} waits for M no longer", replica(s, c, "dispatched"), False


def _more_is_held(s: State, c: int, told: Message, x: Protocol) -> Steps:
    if x.rules.extension_recorded_first:
        yield f"I{c} sees more held, asks M", replica(s, c, "raising", told), True
    else:
        yield f"I{c} sees more held, tells M, goes on", _goes_on(replica(s, c, "dispatched", told), c), True


def _goes_on(s: State, c: int) -> State:
    return s._replace(p_cap=put(s.p_cap, c, EXTENDED))


def extend_at_limits(s: State, m: Message, x: Protocol) -> Steps:
    """R holds more for a call it holds, when there is room, in the epoch it was reserved in; a repeat is answered as before."""
    c, answer = m.call, Message("extend_ok", m.call, m.epoch)
    if s.r_epoch < 0:
        return
    held = s.r[c] == "held" and s.r_epoch == m.epoch
    if held and s.r_hold[c] == EXTENDED:
        yield f"R repeats that more is held for call {c}", s._replace(net=s.net | {answer}), True
    elif held and s.r_used + holds(s) - s.r_hold[c] + EXTENDED <= x.limit:
        yield f"R holds more for call {c}", s._replace(r_hold=put(s.r_hold, c, EXTENDED), net=s.net | {answer}), True
    elif s.i[c] == "asking":
        yield f"R holds no more for call {c}", s._replace(net=s.net | {Message("extend_refused", c)}), True


def extend_at_ledger(s: State, m: Message, x: Protocol) -> Steps:
    """M raises the bound of an open call, in the epoch it was opened in; a bound that is there already is acknowledged in any."""
    c, answer = m.call, Message("raise_ok", m.call)
    stale = x.rules.extension_epoch_checked and m.epoch < s.m_epoch
    if s.m[c] == "open" and (s.m_bound[c] == EXTENDED or not stale):
        yield f"M raises the bound of call {c}", s._replace(m_bound=put(s.m_bound, c, EXTENDED), net=s.net | {answer}), True
    elif s.i[c] == "raising" and answer not in s.net:
        yield f"M raises no bound of call {c}", s._replace(net=s.net | {Message("raise_refused", c)}), True
