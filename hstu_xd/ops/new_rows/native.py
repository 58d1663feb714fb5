"""What new rows read of their users' memories, by loops in C; see ``native.c`` for how.

:mod:`hstu_xd.model.step_memory` lays out what they are given, and has the same in plain PyTorch.
"""

from pathlib import Path

from hstu_xd.ops.native_library import NativeLibrary

LIBRARY = NativeLibrary(
    Path(__file__).with_name("native.c"),
    "q own users rows runs positions times ages edges out",
    "q_stride own_stride layer num_users heads dqk dv origin never_written threads",
)

READ_ROWS, READ_STATES = "hstu_xd_read_rows", "hstu_xd_read_states"

# Fields of a user, in order: addresses, then numbers.
USER_FIELDS = (
    *("memory", "times", "domains", "states", "hidden", "state_times"),
    *("layer_stride", "capacity", "first", "count", "writers", "is_virtual", "row"),
    *("num_states", "states_in_memory"),
)
