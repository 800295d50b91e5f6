"""Contestants in processes of their own that take turns, so that all of them meet the same weather."""

import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Contestant:
    """A child that has got ready; for every line it is sent, it works once and answers with the milliseconds."""

    process: "subprocess.Popen[str]"

    def turn(self) -> float:
        """Milliseconds of one run; RuntimeError when the child has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"a contestant ended with code {self.process.wait()}")
        return float(line)


@contextmanager
def contestants(commands: Mapping[str, tuple[Sequence[str], Mapping[str, str]]]) -> Iterator[dict[str, Contestant]]:
    """Start `python ARGUMENTS` with its environment for each name, one after the other; each says "ready" first."""
    with ExitStack() as stack:
        started = {}
        for name, (arguments, environment) in commands.items():
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    cwd=ROOT,
                    env=dict(environment),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            assert process.stdout is not None
            if process.stdout.readline().strip() != "ready":
                raise RuntimeError(f"{name} did not get ready")
            started[name] = Contestant(process)
        yield started


def interleaved(started: Mapping[str, Contestant], rounds: int) -> dict[str, float]:
    """The median milliseconds of each, after one round that does not count."""
    took: dict[str, list[float]] = {name: [] for name in started}
    for round_number in range(rounds + 1):
        for name, contestant in started.items():
            milliseconds = contestant.turn()
            if round_number:
                took[name].append(milliseconds)
    return {name: statistics.median(times) for name, times in took.items()}
