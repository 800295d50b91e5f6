"""`ddetr VERB ...`: one module of this package a verb, imported only when its verb is asked for."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Protocol, cast

from server.version import version

USAGE = 2  # argparse's
INTERRUPTED = 130  # what a shell reports for a command ended by Ctrl-C

VERBS = {
    "serve": "serve a bundle over HTTP",
    "detect": "detect in files or a folder: JSON, or pictures with the boxes drawn",
    "export": "turn a checkpoint into a bundle, verified against PyTorch",
    "build": "build a TensorRT engine of a checkpoint, into its bundle",
    "train": "train or fine-tune on COCO-format data",
    "evaluate": "measure a checkpoint's AP on COCO-format data",
    "verify": "hold a bundle's engines against its proof, and against data",
    "bench": "measure a server's throughput and latency, or find the best settings",
}

EXAMPLE = """\
example:
  ddetr serve --port 8000
  ddetr VERB --help
"""


class Verb(Protocol):
    """What a module `cli.<verb>` offers."""

    def run(self, argv: Sequence[str]) -> int:
        """Carry out the verb with the arguments after its name; the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status of the process."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words:
        parser().print_help(sys.stderr)
        return USAGE
    if words[0] not in VERBS:
        arguments = parser().parse_args(words)
        words = [arguments.verb, *arguments.arguments]
    # Else without argparse, which would take the `--` out of `ddetr bench -- --port 80`.
    try:
        status = load(words[0]).run(words[1:])
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has left. Point stdout elsewhere, or the interpreter's own flush at exit fails again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def parser() -> argparse.ArgumentParser:
    """The parser of the words before the verb's own arguments."""
    verbs = "\n".join(f"  {name:<10} {summary}" for name, summary in VERBS.items())
    root = argparse.ArgumentParser(
        prog="ddetr",
        usage="ddetr [--help] [--version] VERB ...",
        description=f"Deformable DETR: train, export, serve.\n\nverbs:\n{verbs}",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="version", version=f"ddetr {version()}")
    root.add_argument("verb", choices=VERBS, metavar="VERB", help=argparse.SUPPRESS)
    root.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return root


def load(verb: str) -> Verb:
    """The module of a verb. The import is late so that `ddetr serve` runs on a host without torch."""
    return cast(Verb, importlib.import_module(f"cli.{verb}"))


if __name__ == "__main__":
    sys.exit(main())
