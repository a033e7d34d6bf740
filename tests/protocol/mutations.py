"""The rules of the call protocol, taken out of the code one at a time: the run that needs the rule must then fail.

Not part of `make ci`: `make mutation ONLY='call protocol'`. Where another wall hides that a rule is gone, that wall is taken down with it.
"""

from tests.isolation.mutations import Edit, Mutation

_RUN = "tests/protocol/test_runs.py::test_the_invariants_hold_in_the_run_that_needs_the_rule[{}]"
_OPEN = "services/metering/migrations/0031_opened_calls_are_joined_by_hash.sql"
_VOID = "services/metering/migrations/0029_the_first_cause_is_written.sql"
_FENCE = "services/metering/migrations/0027_batches_are_joined_by_hash.sql"
_EPOCHS = "services/metering/migrations/0008_counted_periods.sql"
_COMMIT = "services/ratelimit/adapters/scripts/commit.lua"
_LOAD = "services/ratelimit/adapters/scripts/load.lua"
_SETTLEMENT = "services/inference/settlement.py"
_OVERRUN = "services/inference/overrun.py"
_EXTEND = "services/metering/migrations/0027_batches_are_joined_by_hash.sql"

# A snapshot also says which calls have ended lately, so that a Reserve that comes again meets its own end and holds nothing.
_NO_RECENT_CALLS = Edit(
    _EPOCHS,
    "k.reserve_time > v_since AND k.product_unit IS NULL AND k.state IN (2, 3, 5)",
    "k.reserve_time > v_since AND k.product_unit IS NULL AND k.state IN (9)",
)
# A replica that is told that its call has ended voids it before it lets go, unless it is void already.
_NO_VOID_AFTER_A_REFUSAL = Edit("services/inference/opening.py", "            if not opened.void:\n", "            if False:\n")


def _without(rule: str, *edits: Edit) -> Mutation:
    return Mutation(f"the call protocol without {rule}", (_RUN.format(rule),), edits)


PROTOCOL_MUTATIONS = (
    _without(
        "open_before_dispatch",
        Edit(
            "services/inference/pipeline.py",
            "        await self._open(attempt, memory)\n        return memory\n",
            "        self._late = asyncio.ensure_future(self._open(attempt, memory))\n        return memory\n",
        ),
    ),
    _without(
        "fence_on_expiry",
        Edit(
            "services/ratelimit/fencing.py",
            "        verdicts = await self._ledger.fence(calls, FENCE_TIMEOUT_SECONDS)\n",
            "        verdicts = [FenceVerdict.VOID for _ in calls]\n",
        ),
    ),
    _without(
        "fence_leaves_tombstone",
        Edit(
            _FENCE,
            "'fenced' FROM unnest(v_reservations) AS c (reservation_id)\n        ON CONFLICT DO NOTHING;",
            "'fenced' FROM unnest(v_reservations) AS c (reservation_id) WHERE false\n        ON CONFLICT DO NOTHING;",
        ),
        Edit(_FENCE, "CASE WHEN k.state = 3 THEN 1 WHEN k.state = 4", "CASE WHEN coalesce(k.state, 3) = 3 THEN 1 WHEN k.state = 4"),
        Edit(
            _FENCE,
            "WITH ORDINALITY AS c (reservation_id, epoch, n)\n        JOIN metering.calls k",
            "WITH ORDINALITY AS c (reservation_id, epoch, n)\n        LEFT JOIN metering.calls k",
        ),
    ),
    _without(
        "epoch_checked_on_open",
        Edit(_OPEN, "            WHERE c.epoch >= v_epoch\n              AND (SELECT true", "            WHERE (SELECT true"),
    ),
    _without(
        "epoch_checked_on_commit",
        Edit(_COMMIT, "  elseif told < epoch then\n", "  elseif told < epoch and ARGV[i + 2] == 'pin' then\n"),
        _NO_RECENT_CALLS,
    ),
    _without(
        "epoch_checked_on_pin",
        Edit(_COMMIT, "  elseif told < epoch then\n", "  elseif told < epoch and ARGV[i + 2] ~= 'pin' then\n"),
        _NO_RECENT_CALLS,
    ),
    _without(
        "newer_epoch_means_rebuild",
        Edit(_COMMIT, "    forget_all()\n    epoch, nonce = nil, nil\n    outcomes", "    outcomes"),
    ),
    _without(
        "rebuild_answers_own_request",
        Edit(_LOAD, "if m[1] or m[2] ~= ARGV[1] then\n", "if m[1] then\n"),
        # Only a request says of which history the data is that answers it; what has none counts as lost.
        Edit(_LOAD, "call('HSET', meta, 'epoch', ARGV[2],", "call('HSET', meta, 'history', current_history(), 'epoch', ARGV[2],"),
    ),
    _without(
        "rebuild_counts_open_calls",
        Edit(_EPOCHS, "    WHERE l.tenant_id = p_tenant\n    UNION ALL", "    WHERE false\n    UNION ALL"),
        Edit(_EPOCHS, "k.unresolved_time IS NOT NULL;", "false;"),
    ),
    _without(
        "fence_dates_the_settlement",
        Edit(_FENCE, "WHEN k.settled_epoch < c.epoch THEN 4 ELSE 3 END", "ELSE 3 END"),
        _NO_RECENT_CALLS,
    ),
    _without(
        "void_before_release",
        Edit(_SETTLEMENT, "        await self._void(attempt, CallToVoid(attempt.ref, certain=True, cause=cause))\n", ""),
    ),
    _without(
        "void_told_by_outbox",
        Edit(
            _VOID,
            "SELECT v_tenant, v.reservation_id, 2, v_epoch, 0, 0 FROM voided v\n",
            "SELECT v_tenant, v.reservation_id, 2, v_epoch, 0, 0 FROM voided v WHERE false\n",
        ),
    ),
    _without(
        "repeated_open_is_acknowledged",
        Edit(_OPEN, "WHEN k.state IN (1, 4) AND (k.call_id", "WHEN k.state = 1 AND (k.call_id"),
        _NO_VOID_AFTER_A_REFUSAL,
    ),
    _without(
        "forget_only_after_reserve_expired",
        Edit(
            "services/ratelimit/adapters/redis_store.py",
            "forget_seconds: float = 2.0 * LARGEST_ID_AGE_SECONDS",
            "forget_seconds: float = 0.0 * LARGEST_ID_AGE_SECONDS",
        ),
    ),
    _without(
        "extension_held_first",
        Edit(_OVERRUN, "                await self._limits.extend(question.tenant, attempt.reservation, hold)\n", ""),
    ),
    _without(
        "extension_recorded_first",
        Edit(_OVERRUN, "                extended = await self._ledger.extend(attempt.ref, hold)\n", "                extended = True\n"),
    ),
    _without("extension_epoch_checked", Edit(_EXTEND, "AND k.open_epoch = v_epoch AND (k.bound_tokens", "AND (k.bound_tokens")),
    _without(
        "extension_in_snapshot",
        # Nothing else remembers what a call was opened with.
        Edit(
            _EXTEND,
            "bound_nano_usd = greatest(k.bound_nano_usd, w.nano_usd)\n",
            "bound_nano_usd = greatest(k.bound_nano_usd, w.nano_usd), prompt_version = k.bound_nano_usd::text\n",
        ),
        Edit(
            _EPOCHS,
            "    UNION ALL\n    SELECT 2::smallint, k.reservation_id, k.state, k.reserve_time, k.bound_tokens, k.bound_nano_usd,",
            "    UNION ALL\n    SELECT 2::smallint, k.reservation_id, k.state, k.reserve_time, k.bound_tokens,"
            " CASE WHEN k.prompt_version ~ '^[0-9]+$' THEN k.prompt_version::bigint ELSE k.bound_nano_usd END,",
        ),
    ),
)
