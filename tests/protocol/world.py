"""The world the call protocol runs in: what each party knows at a moment, what is on the wire, and which rules are in force."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

T = TypeVar("T")

HOLD = 2  # what a call reserves: its worst case
EXTENDED = 3  # its worst case once it was extended


class Message(NamedTuple):
    """What is on the wire; a kind uses only the fields it needs."""

    kind: str
    call: int = -1
    epoch: int = -1
    amount: int = 0
    says: str = ""  # fenced: what M knows of the call
    nonce: int = -1  # rebuild, snapshot: which request
    loads: tuple[str, ...] = ()  # snapshot: the state of each call at R
    bounds: tuple[int, ...] = ()  # snapshot: what each of them may use at most


class State(NamedTuple):
    """One moment of all parties and the wire."""

    # none -> reserving -> opening -> ready -> dispatched -> replied -> done; opening -> giving_up -> done;
    # dispatched -> asking (R for more) -> raising (the bound at M) -> dispatched; dispatched -> interrupting -> done; dead
    i: tuple[str, ...]
    i_epoch: tuple[int, ...]  # the epoch of R under which the call was reserved
    expired: tuple[bool, ...]  # the call's Reserve message is too old: R refuses it from here on
    r: tuple[str, ...]  # none | held | pinned | committed | released
    r_hold: tuple[int, ...]  # what R keeps aside for the call while it is held or pinned, 0 otherwise
    r_epoch: int  # -1: lost its data, must rebuild
    r_used: int
    r_nonce: int  # which rebuild request R waits for
    m: tuple[str, ...]  # none | open | settled | void | unresolved
    m_bound: tuple[int, ...]  # the most the call may use, as M knows it
    m_epoch: int
    p_cap: tuple[int, ...]  # the most P may bill: the holder lets it go on no further
    p: tuple[int, ...]  # billed amount, 0 = not billed
    p_sent: tuple[bool, ...]  # a dispatch is on the wire
    net: frozenset[Message]
    flushes: int
    extensions: int  # how often a call may still be extended


class Rules(NamedTuple):
    """What the protocol relies on; each is turned off in turn, and each removal has a run that goes wrong."""

    open_before_dispatch: bool = True
    fence_on_expiry: bool = True  # R asks M before it lets go of an expired hold
    fence_leaves_tombstone: bool = True  # ... and M remembers the answer, so that a late Open is refused
    epoch_checked_on_open: bool = True  # M refuses an Open reserved before the last rebuild
    epoch_checked_on_commit: bool = True  # R ignores a Commit whose settlement the rebuild already counted
    epoch_checked_on_pin: bool = True  # R ignores a Pin sent before its rebuild: the call may have ended since
    newer_epoch_means_rebuild: bool = True  # a late rebuild request may have moved M on: R that meets a newer epoch rebuilds again
    rebuild_answers_own_request: bool = True  # R loads only the snapshot it asked for last
    rebuild_counts_open_calls: bool = True  # the snapshot carries open and unresolved calls, not only settled ones
    fence_dates_the_settlement: bool = True  # a hold whose call was settled before R's epoch came from a repeated Reserve: it goes
    void_before_release: bool = True  # a caller that gives up after sending Open voids the call at M first
    void_told_by_outbox: bool = True  # every end of a call reaches R through M's outbox, a void too (as a commit of nothing)
    repeated_open_is_acknowledged: bool = True  # an Open that meets its own call unresolved is acknowledged, not refused
    forget_only_after_reserve_expired: bool = True  # R drops the record of an ended call only once it refuses that call's Reserve
    extension_held_first: bool = True  # more is used only once R holds it
    extension_recorded_first: bool = True  # ... and M has recorded the raised bound
    extension_epoch_checked: bool = True  # M raises no bound of a call that was opened before the last rebuild
    extension_in_snapshot: bool = True  # the snapshot carries the raised bound, not the one of the open


class Choices(NamedTuple):
    """What an implementation may decide either way: the invariants hold with each turned off."""

    unresolved_loaded_pinned: bool = True  # off: a rebuilt R loads unresolved calls as held, and fences them when their lease ends
    unresolved_told_by_outbox: bool = True  # off: R learns of it only by its own fence


class Protocol(NamedTuple):
    """The rules in force and the size of the world."""

    rules: Rules = Rules()
    choices: Choices = Choices()
    calls: int = 1
    flushes: int = 0  # how often R may lose its data
    limit: int = 3  # the budget
    extensions: int = 0  # how often a call may be extended, of all calls together


Steps = Iterator[tuple[str, State, bool]]  # label, next state, whether it must happen in the end (crashes and losses need not)


def beginning(x: Protocol) -> State:
    """Nothing has happened to any call."""
    none, zero, no, held = ("none",) * x.calls, (0,) * x.calls, (False,) * x.calls, (HOLD,) * x.calls
    return State(none, zero, no, none, zero, 0, 0, 0, none, held, 0, held, zero, no, frozenset(), 0, x.extensions)


def put(t: tuple[T, ...], k: int, v: T) -> tuple[T, ...]:
    """Return the tuple with its `k`th value replaced."""
    return (*t[:k], v, *t[k + 1 :])


def holds(s: State) -> int:
    """Sum what R keeps aside for calls whose end it does not know."""
    return sum(s.r_hold)


def replica(s: State, c: int, state: str, *sent: Message) -> State:
    """Move the replica of a call on, with what it sends."""
    return s._replace(i=put(s.i, c, state), net=s.net.union(sent))
