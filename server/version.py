"""Which ddetr this is."""

from functools import cache
from importlib import metadata


@cache
def version() -> str:
    """The version that pip installed, or `unknown` in a bare checkout."""
    try:
        return metadata.version("ddetr")
    except metadata.PackageNotFoundError:
        return "unknown"
