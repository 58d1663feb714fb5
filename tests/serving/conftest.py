"""What several modules of tests of the service start from."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folders side by side, see :func:`other_models.write_runs`."""
    from other_models import write_runs  # Who lacks the service's packages has no use for them.

    return write_runs(tmp_path_factory.mktemp("runs"))
