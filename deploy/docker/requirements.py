"""What to install before the package itself, read from pyproject.toml: one requirement a line on standard output.

`requirements.py [--extra NAME]... [--without DISTRIBUTION]... < pyproject.toml`
"""

import argparse
import re
import sys
import tomllib


def main() -> int:
    """Print the package's own requirements and those of the extras, less the distributions named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extra", action="append", default=[], metavar="NAME")
    parser.add_argument("--without", action="append", default=[], metavar="DISTRIBUTION")
    arguments = parser.parse_args()
    project = tomllib.load(sys.stdin.buffer)["project"]
    extras = project["optional-dependencies"]
    if unknown := set(arguments.extra) - set(extras):
        parser.error(f"pyproject.toml has no extra {', '.join(sorted(unknown))}; there are {', '.join(sorted(extras))}")
    lines = [*project["dependencies"], *(line for extra in arguments.extra for line in extras[extra])]
    wanted = (line for line in lines if re.split(r"[\[<>=~!; ]", line)[0] not in arguments.without)
    sys.stdout.write("".join(f"{line}\n" for line in wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
