"""Where states of users outlive a session: in memory, in SQLite on disk, or in Redis."""

from hstu_xd.serving.store.base import StateStore, StoreError, Write
from hstu_xd.serving.store.memory import MemoryStore
from hstu_xd.serving.store.redis_store import RedisStore
from hstu_xd.serving.store.sqlite_store import SQLiteStore

__all__ = ["MemoryStore", "RedisStore", "SQLiteStore", "StateStore", "StoreError", "Write"]
