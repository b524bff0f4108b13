"""What the scripts need beside the library's own dependencies; to be imported before what imports it."""
import sys
from importlib.util import find_spec

PACKAGES = {
    "matplotlib": "matplotlib", "PIL": "pillow", "pyarrow": "pyarrow", "rich": "rich", "sklearn": "scikit-learn"}


def missing() -> list[str]:
    """Return the packages that are not installed."""
    return [package for module, package in PACKAGES.items() if find_spec(module) is None]


if found := missing():
    print(f'error: {", ".join(found)} must be installed: in the repository, pip install -e ".[bench]"', file=sys.stderr)
    sys.exit(2)
