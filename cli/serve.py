"""`ddetr serve`: the service, with a flag for each of its settings."""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic import ValidationError
from pydantic_settings import CliApp, CliSettingsSource, SettingsError

from bundle import BundleError
from server.errors import StartupError
from server.settings import Settings

EXIT_FAILED = 1

METAVARS = {"int": "N", "float": "X", "str": "TEXT", "Path": "PATH"}

DESCRIPTION = """\
Serve a bundle over HTTP: POST pictures to /detect, see /docs for the rest.

Every flag is also an environment variable, named in brackets; a flag wins over its variable."""

EXAMPLE = """\
example:
  ddetr serve --port 8000
  curl -o smear.jpg http://localhost:8000/sample.jpg
  curl -F images=@smear.jpg 'http://localhost:8000/detect?threshold=0.4'
"""


def run(argv: Sequence[str]) -> int:
    """Serve until SIGTERM or SIGINT; 0 after a clean drain."""
    settings = read_settings(argv)
    for line in strangers(os.environ):
        print(f"ddetr serve: {line}", file=sys.stderr)
    from server.run import serve  # the engine and the web stack: not needed for --help or to refuse a flag

    try:
        return serve(settings)
    except (BundleError, StartupError) as error:
        print(f"ddetr serve: {error}", file=sys.stderr)
        return EXIT_FAILED


def read_settings(argv: Sequence[str]) -> Settings:
    """Settings from flags, then the environment, then defaults; a refused value ends the process with a usage error."""
    parser = argparse.ArgumentParser(
        prog="ddetr serve",
        usage="ddetr serve [flags]",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    # The flags are made from the fields of Settings: names, defaults and descriptions have one place.
    source: CliSettingsSource[argparse.ArgumentParser] = CliSettingsSource(
        Settings,
        root_parser=parser,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_show_env_vars=True,
        add_argument_method=add_flag,
    )
    try:
        return CliApp.run(Settings, cli_args=list(argv), cli_settings_source=source)
    except ValidationError as error:
        parser.error(
            "; ".join(refusal(each["type"], each["loc"], each["msg"], each["input"]) for each in error.errors())
        )
    except SettingsError as error:
        parser.error(str(error))


def add_flag(group: argparse._ActionsContainer, *names: str, **options: Any) -> argparse.Action:
    """`add_argument` with the words of a shell instead of Python's: `PATH`, not `tuple[Path,...]`."""
    metavar = options.get("metavar", "")
    if metavar.startswith("tuple["):
        options["metavar"] = "LIST"
    elif metavar in METAVARS:
        options["metavar"] = METAVARS[metavar]
    if options.get("help"):
        text = re.sub(r"default factory: (\w+)", lambda made: f"default: {made[1].replace('_', ' ')}", options["help"])
        options["help"] = text.replace("(default: ())", "(default: none)")
    return group.add_argument(*names, **options)


def refusal(kind: str, location: tuple[int | str, ...], message: str, given: object) -> str:
    """`--port: Input should be less than 65536, not '70000'`, without the value where that is a secret."""
    if not location:
        return message
    name = str(location[0])
    if kind == "string_pattern_mismatch":  # the words that explain the setting say more than its pattern
        message = f"expected {Settings.model_fields[name].description}"
    shown = "" if "key" in name else f", not {given!r}"
    return f"--{name.replace('_', '-')}: {message}{shown}"


def strangers(variables: Iterable[str]) -> list[str]:
    """A line for each variable that looks like a setting's and is none; it may be misspelt."""
    known = [f"DDETR_{name.upper()}" for name in Settings.model_fields]
    lines = []
    for variable in sorted(variables):
        if variable.upper().startswith("DDETR_") and variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), known, n=1)
            lines.append(f"{variable} is no setting{f'; {near[0]} is' if near else ''}")
    return lines
