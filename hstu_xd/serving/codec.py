"""A user's state as one binary value, which knows its checkpoint and whether it is whole.

Layout, little-endian: magic, format, item size (bytes 0..7); the revision, which is a counter and a
checksum of everything else (8..31); the checkpoint's fingerprint (32..47); four sizes (48..79);
of a history that has versions (formats 3 and 5) its version (16 bytes); of a window that keeps
older events (formats 4 and 5) their number (8 bytes); then the arrays, without their spare places.
So a value takes 80 to 104 bytes more than :func:`hstu_xd.serving.state.expected_bytes`.
"""

import struct
from dataclasses import fields, replace
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor, nn

from hstu_xd.data.window import Window
from hstu_xd.model.hstu import CrossDomainHSTU
from hstu_xd.model.settings import EncoderSettings
from hstu_xd.parts import Part
from hstu_xd.serving.state import UserState

# The number of a format is that of the plain one, with which fingerprints are made, and one of each
# of the others that it has.
_MAGIC, _FORMAT, _VERSIONED, _OLDER = b"HXUS", 2, 1, 2
_KIND, _COUNTER, _SIZES = struct.Struct("<4sHH"), struct.Struct("<Q"), struct.Struct("<4Q")
_DIGEST = 16

# Where a value says which one of a user's values it is.
REVISION = slice(8, 32)
_CHECKSUM, _FINGERPRINT = slice(16, 32), slice(32, 48)
_HEAD, _VERSION_BYTES = 80, 16

# Settings that came after version 0.1.0, which stored states.
_LATER = ("layer", "ddsr_layers")


class RefusedState(Exception):
    """A value that must not be used; says why."""


def fingerprint(model: CrossDomainHSTU, window: Window | int, dtype: torch.dtype) -> bytes:
    """Compute what identifies states of one checkpoint, window and number type: 16 bytes."""
    digest = blake2b(digest_size=_DIGEST)
    settings = replace(model.settings, impl="auto")
    # As version 0.1.0 wrote it, where the latest events alone are read.
    read = window if Window.of(window).older else Window.of(window).latest
    digest.update(f"({_FORMAT}, {_text(settings)}, {read}, {str(dtype)!r})".encode())
    if isinstance(settings.layer, Part):
        digest.update(settings.layer.encode())
    digest.update(_bytes(model.catalog.item_domains))
    digest_weights(digest, model)
    return digest.digest()


def digest_weights(digest: blake2b, model: nn.Module) -> None:
    """Add all that a model has learned to a digest."""
    for name, value in sorted(model.state_dict().items()):
        digest.update(repr((name, tuple(value.shape), str(value.dtype))).encode())
        digest.update(_bytes(value))


def _text(settings: EncoderSettings) -> str:
    """Write settings as version 0.1.0 did, by which the states that it stored are known.

    Settings that came later are not among them: a layer of a user's own is digested by itself, and
    which layers have DDSR stands in the names of the weights.
    """
    names = [each.name for each in fields(settings) if each.name not in _LATER]
    names.remove("target_view_heads")
    names.insert(names.index("full_attention_layers"), "target_view_heads")
    values = ", ".join(f"{name}={getattr(settings, name)!r}" for name in names)
    return f"{type(settings).__name__}({values})"


def revision(value: bytes | None) -> bytes:
    """Return which value of its user this is; empty for none, and for what is too short."""
    return b"" if value is None or len(value) < REVISION.stop else value[REVISION]


def encode_state(state: UserState, checkpoint: bytes) -> bytes:
    """Encode the value that follows the one the state was read from: its counter is one more.

    Args:
        state: of a user.
        checkpoint: of :func:`fingerprint`.
    """
    number = _COUNTER.unpack_from(state.revision)[0] if state.revision else 0
    sizes = state.length, state.committed, state.num_rows, len(state.forgotten)
    arrays = (
        state.events[:, : state.length],
        state.forgotten,
        state.state_times,
        state.state_counts,
        state.memory[..., : state.num_rows],
        state.rows[:, : state.num_rows],
        state.state_memory,
    )
    number_of_format = _FORMAT + _VERSIONED * bool(state.version) + _OLDER * bool(state.older)
    more = state.version + (_COUNTER.pack(state.older) if state.older else b"")
    head = _KIND.pack(_MAGIC, number_of_format, state.memory.element_size())
    counter = _COUNTER.pack((number + 1) % 2**64)
    body = b"".join([checkpoint, _SIZES.pack(*sizes), more, *map(_bytes, arrays)])
    return head + counter + _checksum(head + counter, body) + body


def decode_state(
    value: bytes, checkpoint: bytes, settings: EncoderSettings, dtype: torch.dtype
) -> UserState:
    """Decode the state that a value holds.

    Args:
        value: of :func:`encode_state`.
        checkpoint: of :func:`fingerprint`; the state must be of the same.
        settings: of the model.
        dtype: of keys and values.

    Raises:
        RefusedState: the value is damaged, or of another checkpoint.
    """
    head, body = value[: _CHECKSUM.start], value[_CHECKSUM.stop :]
    if len(value) < _HEAD or value[_CHECKSUM] != _checksum(head, body):
        raise RefusedState("is damaged")
    magic, number_of_format, _ = _KIND.unpack_from(value)
    parts = number_of_format - _FORMAT
    is_known = magic == _MAGIC and 0 <= parts <= _VERSIONED + _OLDER
    if not is_known or value[_FINGERPRINT] != checkpoint:
        raise RefusedState("belongs to another checkpoint, window or number type")
    end = _HEAD + _VERSION_BYTES * bool(parts & _VERSIONED)
    version, older = value[_HEAD:end], 0
    if parts & _OLDER:
        (older,), end = _COUNTER.unpack_from(value, end), end + _COUNTER.size
    length, committed, num_rows, forgotten = _SIZES.unpack_from(value, _FINGERPRINT.stop)
    state = UserState.empty(settings, dtype)
    rest = np.frombuffer(bytearray(value), np.uint8, offset=end)

    def take(like: Tensor, *shape: int) -> Tensor:
        nonlocal rest
        size = int(np.prod(shape, dtype=np.int64)) * like.element_size()
        taken, rest = rest[:size], rest[size:]
        return torch.from_numpy(taken).view(like.dtype).view(shape)

    return replace(
        state,
        events=take(state.events, 3, length),
        length=length,
        forgotten=take(state.forgotten, forgotten),
        state_times=take(state.state_times, *state.state_times.shape),
        state_counts=take(state.state_counts, *state.state_counts.shape),
        memory=take(state.memory, *state.memory.shape[:-1], num_rows),
        rows=take(state.rows, len(state.rows), num_rows),
        num_rows=num_rows,
        committed=committed,
        state_memory=take(state.state_memory, *state.state_memory.shape),
        revision=revision(value),
        version=version,
        older=older,
    )


def _checksum(*parts: bytes) -> bytes:
    digest = blake2b(digest_size=_DIGEST)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
