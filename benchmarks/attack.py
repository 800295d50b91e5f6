"""What was attacked, and what it answered: `python -m benchmarks.attack` prints a table in Markdown."""

import argparse
import sys

from benchmarks.machine import machine
from tests.server.hostile import ATTACKS
from tests.server.siege import Siege


def main() -> int:
    """Every attack once; 1 if one is answered otherwise than it must be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="attacks whose name has this in it")
    arguments = parser.parse_args()
    wrong = 0
    with Siege() as siege:
        print(machine())
        print(f"A neighbour's normal request with nobody else there: {siege.calm_ms():.1f} ms (median).\n")
        print("| attack | answer | code | ms | memory, MB | neighbour at worst, ms |")
        print("|---|---|---|---|---|---|")
        for attack in ATTACKS:
            if arguments.only not in attack.name:
                continue
            result = siege.attack(attack)
            right = (result.status, result.code) == (attack.status, attack.code)
            wrong += not right
            name = attack.name if right else f"{attack.name} (**expected {attack.status} {attack.code}**)"
            print(
                f"| {name.replace('|', ' ')} | {result.status} | {result.code} | {result.ms:.0f} "
                f"| {max(0.0, result.growth_mb):.0f} | {result.neighbour_ms:.0f} |",
                flush=True,
            )
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
