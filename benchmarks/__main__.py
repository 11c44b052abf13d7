"""`make bench`: every benchmark, one table each. Wants two quiet cores and some minutes."""

from __future__ import annotations

import sys

from benchmarks import capture, dagster, normalize, reader, replay, simulator, verify


def main() -> None:
    """Run what the command line names (default: all)."""
    known = {
        "simulator": simulator.main,
        "capture": capture.main,
        "dagster": dagster.main,
        "normalize": normalize.main,
        "reader": reader.main,
        "replay": replay.main,
        "verify": verify.main,
    }
    wanted = sys.argv[1:] or list(known)
    sys.argv[1:] = []
    for name in wanted:
        print(f"\n## {name}\n", flush=True)
        known[name]()


if __name__ == "__main__":
    main()
