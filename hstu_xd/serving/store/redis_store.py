"""States in Redis: one value a user, shared by processes on several machines."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hstu_xd.errors import InputError
from hstu_xd.serving.codec import REVISION
from hstu_xd.serving.store.base import StoreError, Write

if TYPE_CHECKING:
    from redis import Redis

# Replaces a value whose revision is the expected one. What is not there or too short has none.
_COMPARE_AND_SET = f"""
local present = redis.call('GETRANGE', KEYS[1], {REVISION.start}, {REVISION.stop - 1})
if #present < {REVISION.stop - REVISION.start} then present = '' end
if present ~= ARGV[1] then return 0 end
if ARGV[3] == '0' then
  redis.call('SET', KEYS[1], ARGV[2])
else
  redis.call('SET', KEYS[1], ARGV[2], 'EX', ARGV[3])
end
return 1
"""


class RedisStore:
    """A :class:`StateStore` in Redis; the requests of one call travel together.

    How much survives a crash of Redis itself is Redis's own setting (its append-only file).

    Args:
        client: of redis-py (``pip install hstu-xd[serving]``), with ``decode_responses`` off.
        prefix: of all keys.
        ttl: seconds after its last write that a value is kept; None: for good.

    Raises:
        InputError: a time below a second.
    """

    def __init__(
        self, client: "Redis", *, prefix: str = "hstu-xd:", ttl: int | None = None
    ) -> None:
        if ttl is not None and ttl < 1:
            raise InputError(f"ttl is {ttl}; at least 1 second, or None to keep values for good")
        self._client, self._prefix, self._ttl = client, prefix, ttl or 0
        self._compare_and_set = client.register_script(_COMPARE_AND_SET)

    def revisions(self, users: Sequence[str]) -> list[bytes]:
        """Revision of each user's value, empty where there is none."""
        with self._explained():
            pipeline = self._client.pipeline(transaction=False)
            for user in users:
                pipeline.getrange(self._prefix + user, REVISION.start, REVISION.stop - 1)
            found = pipeline.execute()
        whole = REVISION.stop - REVISION.start
        return [present if len(present) == whole else b"" for present in found]

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """Each user's value, None where there is none."""
        with self._explained():
            pipeline = self._client.pipeline(transaction=False)
            for user in users:
                pipeline.get(self._prefix + user)
            return pipeline.execute()

    def put(self, writes: Sequence[Write]) -> list[bool]:
        """Store each value where the present one is still the expected one."""
        with self._explained():
            pipeline = self._client.pipeline(transaction=False)
            for user, value, expected in writes:
                arguments = [expected, value, self._ttl]
                self._compare_and_set([self._prefix + user], arguments, client=pipeline)
            return [stored == 1 for stored in pipeline.execute()]

    def delete(self, user: str) -> bool:
        """Remove a user's value; returns whether there was one."""
        with self._explained():
            return bool(self._client.delete(self._prefix + user))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        from redis import RedisError

        try:
            yield
        except RedisError as error:
            raise StoreError(f"Redis: {error}; is it up, and is there room?") from error
