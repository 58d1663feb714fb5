"""Where gin files, yaml files and patches lie: in a wheel, or at the root of a checkout."""

from pathlib import Path

from hstu_xd.errors import HstuXdError

_PACKAGE = Path(__file__).parent


def gin_folder() -> Path:
    """Folder of the gin files that come with this package."""
    return _folder("gin")


def patches_folder() -> Path:
    """Folder of the patches that come with this package, one subfolder a codebase."""
    return _folder("patches")


def yaml_folder() -> Path:
    """Folder of the yaml files that come with this package."""
    return _folder("yaml")


def _folder(name: str, package: Path = _PACKAGE) -> Path:
    installed = package / "_files" / name
    if installed.is_dir():
        return installed
    # Beside an installed package lies site-packages, whose folder gin/ is the gin-config library:
    # the parent counts only where it is this project's own checkout.
    root = package.parent
    if (root / "pyproject.toml").is_file() and (root / name).is_dir():
        return root / name
    raise HstuXdError(
        f"the folder {name}/ of hstu-xd is not at {installed}; install hstu-xd again from its "
        "wheel or its repository"
    )
