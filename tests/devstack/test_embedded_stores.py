"""The embedded stores are the real ones."""

import asyncpg
import redis.asyncio

from tests.support.stores import PostgresStore, RedisStore, running_redis


async def test_each_database_is_fresh_and_durable(postgres: PostgresStore) -> None:
    """A fresh database is empty, and Postgres runs with fsync on."""
    connection = await asyncpg.connect(await postgres.fresh_database())
    tables = await connection.fetchval("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
    fsync = await connection.fetchval("SHOW fsync")
    version = await connection.fetchval("SHOW server_version_num")
    await connection.close()
    assert (tables, fsync, int(version) // 10000) == (0, "on", 18)


async def test_redis_needs_its_password_and_never_evicts(redis_server: RedisStore) -> None:
    """Redis answers with its password and keeps every key."""
    client = redis.asyncio.from_url(redis_server.url)
    policy = await client.config_get("maxmemory-policy")
    await client.aclose()
    assert policy == {"maxmemory-policy": "noeviction"}


async def test_emptied_redis_has_no_keys() -> None:
    """`flush` loses everything, as a restart without persistence would."""
    async with running_redis() as store:
        client = redis.asyncio.from_url(store.url)
        await client.set("a", "1")
        await store.flush()
        left = await client.dbsize()
        await client.aclose()
    assert left == 0
