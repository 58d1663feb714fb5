"""Where the files of the web page lie, and under which paths they are served."""

from pathlib import Path

PAGE = Path(__file__).parent / "page"


def page_files() -> dict[str, Path]:
    """Path -> file; ``index.html`` is at the root."""
    return {
        "/" if file.name == "index.html" else f"/{file.name}": file
        for file in sorted(PAGE.glob("*.*"))
    }
