"""Verbs that another package carries out: its command module has the parser, the help and the work."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from bundle import BundleError

EXIT_MISSING_EXTRA = 2
EXIT_FAILED = 1


def hand_over(verb: str, module: str, extra: str, argv: Sequence[str]) -> int:
    """Call `module.main(argv)` under the name `ddetr <verb>`; a library that is not installed is one line on stderr."""
    try:
        command = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in ("", module.partition(".")[0]):
            raise
        say_missing_extra(verb, extra, missing)
        return EXIT_MISSING_EXTRA
    # argparse names the program after argv[0]: the usage line shall say what was typed.
    name = sys.argv[0]
    sys.argv[0] = f"ddetr {verb}"
    try:
        return int(command.main(list(argv)) or 0)
    except BundleError as error:
        print(f"ddetr {verb}: {error}", file=sys.stderr)
        return EXIT_FAILED
    finally:
        sys.argv[0] = name


def say_missing_extra(verb: str, extra: str, library: str) -> None:
    """One line on stderr: what is not installed, and how to install it."""
    print(
        f"ddetr {verb} needs the {extra} extra: {sys.executable} -m pip install 'ddetr[{extra}]' "
        f"({library} is not installed)",
        file=sys.stderr,
    )
