"""The statements behind questions about use, made of what is asked for alone: a plan is kept for each, and holds nothing else.

Every statement names its tenants; in the service role's transaction policies let one of them be seen.
"""

from collections.abc import Sequence
from uuid import UUID

from services.metering.usage_plan import Grain, Range
from services.metering.usage_query import Dimension, Measure, RowPosition, UsageQuery

# Tenants that used anything, one look into the index for each: how much they used does not matter.
_EVERY_TENANT = """
    WITH RECURSIVE folded AS (
        (SELECT tenant_id FROM metering.usage_rollups ORDER BY tenant_id LIMIT 1)
        UNION ALL
        SELECT (SELECT u.tenant_id FROM metering.usage_rollups u WHERE u.tenant_id > f.tenant_id ORDER BY u.tenant_id LIMIT 1)
        FROM folded f WHERE f.tenant_id IS NOT NULL
    )
    SELECT tenant_id FROM folded WHERE tenant_id IS NOT NULL
    UNION SELECT tenant_id FROM metering.usage_pending
"""
SELECT_OUTSTANDING = """
SELECT clock_timestamp() AS read_time, count(*) AS call_count, coalesce(sum(o.bound_nano_usd), 0)::bigint AS bound_nano_usd
FROM (
    SELECT k.bound_nano_usd
    FROM metering.call_leases l JOIN metering.calls k ON k.tenant_id = $1 AND k.reservation_id = l.reservation_id AND k.state = 1
    WHERE l.tenant_id = $1
    UNION ALL
    SELECT k.bound_nano_usd FROM metering.calls k WHERE k.tenant_id = $1 AND k.unresolved_time IS NOT NULL
) o
"""
# One plan for all arguments: every look is a look into an index, whatever they are, and planning would cost more than most answers.
# Groups are few: hashed, they need no sort.
PLAN_ONCE = "SET LOCAL plan_cache_mode = force_generic_plan; SET LOCAL enable_sort = off; SET LOCAL jit = off"

COLUMNS = {
    Dimension.TENANT: "tenant_id",
    Dimension.USER: "user_name",
    Dimension.FEATURE: "feature",
    Dimension.MODEL: "model",
    Dimension.PROMPT_VERSION: "prompt_version",
    Dimension.PROVIDER: "provider",
    Dimension.TIER: "tier",
    Dimension.PRODUCT_UNIT: "product_unit",
    Dimension.EVENT_TYPE: "event_type",
    Dimension.REFUSAL_REASON: "refusal_reason",
    Dimension.REFUSAL_RULE: "refusal_rule",
}
_MEASURES = (
    "settled, void, unresolved, reconciled, retries, refused, overloaded, failed, cancelled, deadline, lost, other, "
    "input, output, cache_read, cache_write_5m, cache_write_1h, cost, refusals"
)
_SUMMED = """
    {0}.settled_calls AS settled, {0}.void_calls AS void, {0}.unresolved_calls AS unresolved, {0}.reconciled_calls AS reconciled,
    {0}.retries, {0}.refused_calls AS refused, {0}.overloaded_calls AS overloaded, {0}.failed_calls AS failed,
    {0}.cancelled_calls AS cancelled, {0}.deadline_calls AS deadline, {0}.lost_calls AS lost, {0}.other_calls AS other,
    {0}.input_tokens AS input, {0}.output_tokens AS output, {0}.cache_read_tokens AS cache_read,
    {0}.cache_write_5m_tokens AS cache_write_5m, {0}.cache_write_1h_tokens AS cache_write_1h, {0}.cost_nano_usd AS cost, {0}.refusals,
    {0}.quantity
"""
# What one row of the log, or one call or event, counts; what has a level is no amount.
_COUNTED = """
    {0}.sign * ({0}.state = 2)::integer, {0}.sign * ({0}.state = 3)::integer,
    {0}.sign * ({0}.state = 4)::integer, {0}.sign * ({0}.state = 5)::integer,
    {0}.sign * ({0}.attempt IS NOT NULL AND {0}.attempt > 1)::integer,
    {0}.sign * coalesce({0}.cause = 1, false)::integer, {0}.sign * coalesce({0}.cause = 2, false)::integer,
    {0}.sign * coalesce({0}.cause = 3, false)::integer, {0}.sign * coalesce({0}.cause = 4, false)::integer,
    {0}.sign * coalesce({0}.cause = 5, false)::integer, {0}.sign * coalesce({0}.cause = 6, false)::integer,
    {0}.sign * coalesce({0}.cause = 7, false)::integer,
    {0}.sign * {0}.input_tokens, {0}.sign * {0}.output_tokens, {0}.sign * {0}.cache_read_tokens, {0}.sign * {0}.cache_write_5m_tokens,
    {0}.sign * {0}.cache_write_1h_tokens, {0}.sign * {0}.cost_nano_usd, {0}.refusals,
    CASE WHEN {0}.level IS NULL THEN {0}.sign * {0}.quantity ELSE 0 END
"""
# The ranges follow each other without a gap: the log's rows find theirs among the starts.
_PENDING = """
    (SELECT p.*, {bucket_of_pending} AS bucket FROM asked a JOIN metering.usage_pending p ON p.tenant_id = a.tenant_id
     CROSS JOIN LATERAL (SELECT width_bucket(p.use_time, {starts}) AS number) w
     WHERE w.number > 0 AND p.use_time < ({ends})[cardinality({ends})] AND ({grains})[w.number] > 0)
"""
_COUNTED_COLUMNS = (
    "tenant_id, sign, use_time, provider, model, feature, user_name, prompt_version, tier, product_unit, event_type, state, attempt, "
    "cause, input_tokens, output_tokens, cache_read_tokens, cache_write_5m_tokens, cache_write_1h_tokens, cost_nano_usd, quantity, level, "
    "first_token_ms, total_ms"
)
# Events are found by their time of record, which is near their use or in an index of its own.
_CALLS = f"""
    (SELECT c.*, {{bucket_of_call}} AS bucket FROM {{ranges}} s CROSS JOIN asked a
     CROSS JOIN LATERAL (
         SELECT {_COUNTED_COLUMNS}, '' AS refusal_reason, '' AS refusal_rule, 0 AS refusals FROM metering.counted_use u
         WHERE u.tenant_id = a.tenant_id AND u.use_time >= s.start_time AND u.use_time < s.end_time
         UNION ALL
         SELECT {_COUNTED_COLUMNS}, '', '', 0 FROM metering.counted_events e
         WHERE e.tenant_id = a.tenant_id AND e.use_time >= s.start_time AND e.use_time < s.end_time
           AND (NOT e.is_near OR e.record_time >= s.start_time - interval '1 day' AND e.record_time < s.end_time + interval '1 day')
         UNION ALL
         SELECT r.tenant_id, 1, r.minute, '', r.model, r.feature, r.user_name, '', r.tier, '', '', 0, NULL, NULL, 0, 0, 0, 0, 0, 0, 0, NULL,
                0, 0, r.reason, r.rule, r.refusals
         FROM metering.refusals r
         WHERE r.tenant_id = a.tenant_id AND r.minute >= s.start_time AND r.minute < s.end_time
         OFFSET 0) c
     WHERE s.grain = 0)
"""  # noqa: S608 - made of the fragments above alone
# OFFSET 0 keeps each look a look into the index, one for each tenant and range: in another order all of a tenant's rows are read.
_SUMS = """
    (SELECT u.*, {bucket_of_sum} AS bucket FROM {ranges} s CROSS JOIN asked a
     CROSS JOIN LATERAL (SELECT * FROM metering.usage_rollups u
                         WHERE u.tenant_id = a.tenant_id AND u.grain = s.grain
                           AND u.start_time >= s.start_time AND u.start_time < s.end_time OFFSET 0) u
     WHERE s.grain > 0)
"""
# Of users that are named, one look for each of them: how many others there are does not matter.
_SUMS_OF_USERS = """
    (SELECT u.*, {bucket_of_sum} AS bucket FROM {ranges} s CROSS JOIN asked a CROSS JOIN (SELECT DISTINCT unnest({users})) AS w (named)
     CROSS JOIN LATERAL (SELECT * FROM metering.usage_rollups u
                         WHERE u.tenant_id = a.tenant_id AND u.user_name = w.named AND u.user_name <> '' AND u.grain = s.grain
                           AND u.start_time >= s.start_time AND u.start_time < s.end_time OFFSET 0) u
     WHERE s.grain > 0)
"""
# Levels have names of their own alone.
_LEVELS = """
    (SELECT v.*, {bucket_of_level} AS bucket FROM level_ranges s CROSS JOIN asked a
     CROSS JOIN LATERAL (SELECT u.*, ''::text AS provider, ''::text AS model, ''::text AS prompt_version, ''::text AS tier,
                                ''::text AS refusal_reason, ''::text AS refusal_rule
                         FROM metering.usage_levels u
                         WHERE u.tenant_id = a.tenant_id AND u.grain = s.grain
                           AND u.start_time >= s.start_time AND u.start_time < s.end_time OFFSET 0) v
     WHERE s.grain > 0)
"""
_RANGES = "SELECT * FROM unnest({starts}, {ends}, {grains}) AS s (start_time, end_time, grain)"
_ENDED = "settled + void + unresolved + reconciled"
# Shares are ranked by millionths.
_RANKS = {
    Measure.TIME: "0",
    Measure.COST: "cost",
    Measure.SETTLED: "settled",
    Measure.FAILED: "void + unresolved + reconciled",
    Measure.FAILED_SHARE: f"1000000 * (void + unresolved + reconciled) / nullif({_ENDED}, 0)",
    Measure.RETRIES: "retries",
    Measure.RETRY_SHARE: f"1000000 * retries / nullif({_ENDED}, 0)",
    Measure.TOKENS: "input + output + cache_read + cache_write_5m + cache_write_1h",
    Measure.CACHE_HIT_SHARE: "1000000 * cache_read / nullif(input + cache_read + cache_write_5m + cache_write_1h, 0)",
    Measure.QUANTITY: "least(greatest(quantity, -9223372036854775807), 9223372036854775807)",
    Measure.FIRST_TOKEN_P95: "(1000 * first_token_p95)::bigint",
    Measure.TOTAL_P95: "(1000 * total_p95)::bigint",
    Measure.REFUSALS: "refusals",
}
_KINDS = "(VALUES (1::smallint, {0}.first_token_ms), (2::smallint, {0}.total_ms)) AS m (kind, ms)"
# The middle of a bucket of the scale: see metering.latency_bucket.
_MIDDLE = "power(1.1::float8, {0}) * 2 / 2.1"
# What sums, log and calls count.
_COUNTS = (
    "SELECT {names}, {amounts} FROM {sums} u WHERE true{filters}",
    "SELECT {names}, {amounts} FROM {pending} p WHERE true{filters}",
    "SELECT {names}, {amounts} FROM {calls} c WHERE true{filters}",
)
# Of each level how many events stand.
_STANDING = (
    "SELECT {names}, u.event_type AS of_type, u.level, u.events FROM {levels} u WHERE true{filters}",
    "SELECT {names}, p.event_type, p.level, p.sign * p.quantity FROM {pending} p WHERE p.level IS NOT NULL{filters}",
    "SELECT {names}, c.event_type, c.level, c.sign * c.quantity FROM {calls} c WHERE c.level IS NOT NULL{filters}",
)
_AMOUNTS = {"u": _SUMMED.format("u"), "p": _COUNTED.format("p"), "c": _COUNTED.format("c")}
_GROUPED = f"""
WITH asked AS MATERIALIZED (
    {{tenants}}
), ranges AS MATERIALIZED (
    {{ranges}}
), level_ranges AS MATERIALIZED (
    {{level_ranges}}
), highest AS (
    SELECT {{keys}}, max(level) AS quantity
    FROM (SELECT {{keys}}, of_type, level FROM ({{levels}}) l GROUP BY {{keys}}, of_type, level HAVING sum(events) > 0) h
    GROUP BY {{keys}}, of_type
), grouped AS (
    SELECT {{keys}}, {", ".join(f"sum({name})::bigint AS {name}" for name in _MEASURES.split(", "))}, sum(quantity) AS quantity
    FROM ({{branches}} UNION ALL SELECT {{keys}}, {"0, " * len(_MEASURES.split(", "))}quantity FROM highest) f
    GROUP BY {{keys}}
    HAVING (sum(settled), sum(void), sum(unresolved), sum(reconciled), sum(quantity), sum(refusals)) <> (0, 0, 0, 0, 0, 0)
)
"""  # noqa: S608 - made of the fragments above alone
# How long they took, likewise.
_TIMES = (
    """
    SELECT {names}, l.kind, l.scale, l.calls FROM {sums} u
    CROSS JOIN LATERAL (SELECT l.kind, l.bucket AS scale, l.calls FROM metering.usage_latencies l
                        WHERE l.tenant_id = u.tenant_id AND l.start_time = u.start_time AND l.series = u.series OFFSET 0) l
    WHERE true{filters}
""",
    """
    SELECT {names}, m.kind, metering.latency_bucket(m.ms), p.sign
    FROM {pending} p CROSS JOIN LATERAL {kinds} WHERE p.state = 2 AND m.ms > 0{filters}
""",
    """
    SELECT {names}, m.kind, metering.latency_bucket(m.ms), c.sign
    FROM {calls} c CROSS JOIN LATERAL {kinds} WHERE c.state = 2 AND m.ms > 0{filters}
""",
)
_TIMED = """
, latency_ranges AS MATERIALIZED (
    {ranges}
), timed AS (
    SELECT {keys}, kind, scale, sum(calls) AS calls FROM ({branches}) t
    GROUP BY {keys}, kind, scale HAVING sum(calls) > 0
), climbed AS (
    SELECT *, sum(calls) OVER (PARTITION BY {keys}, kind ORDER BY scale) AS so_far, sum(calls) OVER (PARTITION BY {keys}, kind) AS whole
    FROM timed
), placed AS (
    SELECT {keys}, kind, max(whole)::bigint AS whole, min(scale) FILTER (WHERE so_far >= 0.5 * whole) AS p50,
           min(scale) FILTER (WHERE so_far >= 0.95 * whole) AS p95, min(scale) FILTER (WHERE so_far >= 0.99 * whole) AS p99
    FROM climbed GROUP BY {keys}, kind
), with_latencies AS (
    SELECT g.*, {first_token}, {total}
    FROM grouped g
    LEFT JOIN (SELECT * FROM placed WHERE kind = 1) f USING ({keys})
    LEFT JOIN (SELECT * FROM placed WHERE kind = 2) e USING ({keys})
)
"""


class UsageStatement:
    """One question as a statement and its arguments; questions that differ in these alone have one text."""

    def __init__(self, tenant_ids: Sequence[UUID], query: UsageQuery, after: RowPosition | None, size: int) -> None:
        """Asks about all tenants where the list is empty."""
        self.arguments: list[object] = []
        self._query = query
        self._dimensions = [dimension for dimension in COLUMNS if dimension in query.group_by]
        self._keys = ["bucket", *(COLUMNS[dimension] for dimension in self._dimensions)]
        self._tenants = _EVERY_TENANT
        if tenant_ids:
            self._tenants = f"SELECT a.tenant_id FROM unnest({self._argument(list(tenant_ids), 'uuid[]')}) AS a (tenant_id)"  # noqa: S608
        self._users = self._argument(list(query.filter.users), "text[]") if query.filter.users else ""
        self._filters = self._filter()
        starts = query.bucket_starts()
        self._bucket = "0" if len(starts) == 1 else f"width_bucket({{0}}, {self._argument(starts, 'timestamptz[]')}) - 1"
        grouped = self._grouped(query.ranges(), query.level_ranges())
        timed = self._timed(query.latency_ranges()) if query.tells_latencies else ""
        self.text = grouped + timed + self._page(after, size)

    def _argument(self, value: object, kind: str) -> str:
        self.arguments.append(value)
        return f"${len(self.arguments)}::{kind}"

    def _filter(self) -> str:
        wanted = self._query.filter
        users = f" AND {{0}}.user_name = ANY ({self._users})" if self._users else ""
        lists = {
            "feature": wanted.features,
            "model": wanted.models,
            "prompt_version": wanted.prompt_versions,
            "provider": wanted.providers,
            "tier": wanted.tiers,
            "product_unit": wanted.product_units,
            "event_type": wanted.event_types,
            "refusal_reason": wanted.refusal_reasons,
            "refusal_rule": wanted.refusal_rules,
        }
        others = (f" AND {{0}}.{column} = ANY ({self._argument(list(names), 'text[]')})" for column, names in lists.items() if names)
        return users + "".join(others)

    def _ranges(self, parts: Sequence[Range]) -> dict[str, str]:
        return {
            "starts": self._argument([part.start for part in parts], "timestamptz[]"),
            "ends": self._argument([part.end for part in parts], "timestamptz[]"),
            "grains": self._argument([int(part.grain) for part in parts], "smallint[]"),
        }

    def _names(self, table: str) -> str:
        return ", ".join(f"{table}.{key}" for key in self._keys)

    def _branches(self, templates: Sequence[str], parts: Sequence[Range], **fragments: str) -> str:
        """Joins what sums, log and calls say; the last is left out where no call is read."""
        kept = templates if any(part.grain is Grain.CALLS for part in parts) else templates[:-1]
        return " UNION ALL ".join(
            template.format(
                names=self._names(table),
                amounts=_AMOUNTS[table],
                kinds=_KINDS.format(table),
                filters=self._filters.format(table),
                **fragments,
            )
            for table, template in zip(_AMOUNTS, kept, strict=False)
        )

    def _grouped(self, parts: Sequence[Range], level_parts: Sequence[Range]) -> str:
        ranges, level_ranges = self._ranges(parts), self._ranges(level_parts)
        return _GROUPED.format(
            tenants=self._tenants,
            ranges=_RANGES.format(**ranges),
            level_ranges=_RANGES.format(**level_ranges),
            keys=", ".join(self._keys),
            levels=self._branches(_STANDING, level_parts, **self._read("level_ranges", level_ranges)),
            branches=self._branches(_COUNTS, parts, **self._read("ranges", ranges)),
        )

    def _timed(self, parts: Sequence[Range]) -> str:
        ranges = self._ranges(parts)
        return _TIMED.format(
            ranges=_RANGES.format(**ranges),
            keys=", ".join(self._keys),
            branches=self._branches(_TIMES, parts, **self._read("latency_ranges", ranges)),
            first_token=_latency("f", "first_token"),
            total=_latency("e", "total"),
        )

    def _read(self, name: str, ranges: dict[str, str]) -> dict[str, str]:
        """What reads ranges of that name, each row with its bucket."""
        # What names nobody stands beside what everybody used: that is not found by name.
        sums = _SUMS_OF_USERS if self._users and all(self._query.filter.users) else _SUMS
        return {
            "sums": sums.format(ranges=name, users=self._users, bucket_of_sum=self._bucket.format("u.start_time")),
            "levels": _LEVELS.format(bucket_of_level=self._bucket.format("v.start_time")),
            "pending": _PENDING.format(bucket_of_pending=self._bucket.format("p.use_time"), **ranges),
            "calls": _CALLS.format(ranges=name, bucket_of_call=self._bucket.format("c.use_time")),
        }

    def _page(self, after: RowPosition | None, size: int) -> str:
        """A rank rises along the rows; buckets and names decide between rows of one rank."""
        query, keys = self._query, ", ".join(self._keys)
        sign = 1 if query.ascending or query.order_by is Measure.TIME else -1
        source = "with_latencies" if query.tells_latencies else "grouped"
        return f"""
SELECT * FROM (SELECT *, ({sign} * coalesce({_RANKS[query.order_by]}, -1))::bigint AS rank FROM {source}) r
{self._following(after)} ORDER BY rank, {keys} LIMIT {self._argument(size, "integer")}"""  # noqa: S608 - as above

    def _following(self, after: RowPosition | None) -> str:
        if after is None:
            return ""
        key = after.key
        values = [self._argument(after.rank, "bigint"), self._argument(key.bucket, "integer")]
        for dimension in self._dimensions:
            if dimension is Dimension.TENANT:
                values.append(self._argument(key.tenant_id, "uuid"))
            else:
                values.append(self._argument(key.names[dimension - Dimension.USER], "text"))
        return f"WHERE (rank, {', '.join(self._keys)}) > ({', '.join(values)})"


def _latency(table: str, kind: str) -> str:
    percentiles = ", ".join(f"{_MIDDLE.format(f'{table}.p{share}')} AS {kind}_p{share}" for share in (50, 95, 99))
    return f"coalesce({table}.whole, 0) AS {kind}_count, {percentiles}"
