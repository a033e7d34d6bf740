"""One state for many that nothing can tell apart: drops what no party will ever act on again, and swaps like calls.

Only for the protocol with all its rules: every dropped message is one its reader ignores now and in every later state, and it is the
rules that make it so. With a rule removed, explore without it.
"""

from __future__ import annotations

from tests.protocol.world import EXTENDED, HOLD, Message, State

_READER = {
    "reserve_ok": "reserving",
    "refused": "reserving",
    "open_ok": "opening",
    "open_refused": "opening",
    "void_ok": "giving_up",
    "interrupt_ok": "interrupting",
    "settle_ok": "replied",
}
_ENDED = ("committed", "released")


def quiet(s: State) -> State:
    """Drop inert messages, and give one name to what differs only in history."""
    floor = _lowest_epoch_to_come(s)
    answered = frozenset(m.nonce for m in s.net if m.kind == "snapshot" and (m.nonce < s.r_nonce or s.r_epoch >= 0))
    # An ended call and a forgotten one behave alike once its Reserve is refused.
    r = tuple(("none" if late else "released") if now in _ENDED else now for now, late in zip(s.r, s.expired, strict=True))
    i = tuple("done" if now == "dead" else now for now in s.i)
    i_epoch = tuple(epoch if _acts_on_epoch(now, s.extensions) else 0 for epoch, now in zip(s.i_epoch, i, strict=True))
    # Nobody asks for the bound of a call that is over, or how far a billed one may go.
    m_bound = tuple(HOLD if now in ("settled", "void") else bound for bound, now in zip(s.m_bound, s.m, strict=True))
    p_cap = tuple(HOLD if billed else cap for cap, billed in zip(s.p_cap, s.p, strict=True))
    shut = tuple(
        s.r_epoch >= 0 and (now in ("released", "pinned") or (now == "none" and late)) for now, late in zip(r, s.expired, strict=True)
    )
    net = frozenset(m for m in s.net if not _inert(s, m, floor, shut, answered))
    return s._replace(i=i, i_epoch=i_epoch, r=r, m_bound=m_bound, p_cap=p_cap, net=net if len(net) < len(s.net) else s.net)


def _acts_on_epoch(i: str, extensions: int) -> bool:
    return i in ("opening", "giving_up", "asking") or (extensions > 0 and i in ("ready", "dispatched", "raising"))


def canonical(s: State) -> State:
    """Let one stand for two states that differ only by swapping two like calls."""
    s = quiet(s)
    if len(s.i) != 2:
        return s
    fields = (s.i, s.r, s.m, s.p, s.p_sent, s.i_epoch, s.expired, s.r_hold, s.m_bound, s.p_cap)
    if fields <= tuple(f[::-1] for f in fields):
        return s
    i, r, m, p, p_sent, i_epoch, expired, r_hold, m_bound, p_cap = (f[::-1] for f in fields)
    net = frozenset(_renamed(x) for x in s.net)
    like = s._replace(i=i, i_epoch=i_epoch, expired=expired, r=r, m=m, p=p, p_sent=p_sent, net=net)  # type: ignore[arg-type]
    return like._replace(r_hold=r_hold, m_bound=m_bound, p_cap=p_cap)  # type: ignore[arg-type]


def _renamed(m: Message) -> Message:
    return m._replace(call=1 - m.call if m.call >= 0 else m.call, loads=m.loads[::-1], bounds=m.bounds[::-1])


def _lowest_epoch_to_come(s: State) -> int:
    """No epoch below it is ever R's again: what an older message says to R is ignored for good."""
    if s.r_epoch >= 0:
        return s.r_epoch
    return min((m.epoch for m in s.net if m.kind == "snapshot" and m.nonce == s.r_nonce), default=s.m_epoch + 1)


def _inert(s: State, m: Message, floor: int, shut: tuple[bool, ...], answered: frozenset[int]) -> bool:
    c = m.call
    match m.kind:
        case "rebuild" | "snapshot":
            return m.nonce in answered
        case "reserve":
            return s.expired[c] and s.i[c] != "reserving"
        case "commit" | "pin" | "release" | "fenced":
            return _unheard_by_r(s, m, floor, shut[c]) or m.says == "settled"
        case "extend":
            done = m.epoch == s.r_epoch and s.r_hold[c] == EXTENDED
            return s.i[c] != "asking" and (done or _unheard_by_r(s, m, floor, shut[c]))
        case "fence":
            return s.m[c] not in ("none", "open") and _unheard_by_r(s, m, floor, shut[c])
    return _unheard_by_m(s, m)


def _unheard_by_r(s: State, m: Message, floor: int, shut: bool) -> bool:
    if m.epoch < floor:
        return True
    # A pinned call still takes its commit.
    return m.epoch == s.r_epoch and shut and not (m.kind == "commit" and s.r[m.call] == "pinned")


def _unheard_by_m(s: State, m: Message) -> bool:
    i, now = s.i[m.call], s.m[m.call]
    match m.kind:
        case "raise":
            return i != "raising" and (now != "open" or m.epoch < s.m_epoch or s.m_bound[m.call] == EXTENDED)
        case "extend_ok" | "extend_refused" | "raise_ok" | "raise_refused":
            # An answer to an earlier question stays readable for who may ask again.
            return i not in ("asking", "raising") and not (s.extensions and i == "dispatched")
        case "open":
            return i != "opening" and (now != "none" or m.epoch < s.m_epoch)
        case "void":
            return i != "giving_up" and now in ("void", "settled")
        case "interrupt":
            return i != "interrupting" and now not in ("none", "open")
        case "settle":
            return now in ("void", "settled")
    return i != _READER[m.kind]
