"""When the tests of the loops in C can run."""

import pytest

from hstu_xd.ops.domain_attention.native import LIBRARY

problem = LIBRARY.problem()
needs_compiler = pytest.mark.skipif(problem is not None, reason=f"no loops in C here: {problem}")
