"""Where the commands of plug-ins are typed."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def workplace(tmp_path: Path, tiny_store: Path) -> Path:
    """A folder laid out as a user's checkout: gin files and a prepared store."""
    (tmp_path / "gin").symlink_to(ROOT / "gin")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "amazon").symlink_to(tiny_store)
    return tmp_path
