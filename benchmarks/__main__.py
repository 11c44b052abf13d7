"""`make bench`: every benchmark, one table each. Wants two quiet cores and some minutes."""

from __future__ import annotations

import sys

from benchmarks import capture, dagster, normalize, reader, replay, simulator, verify


def main() -> None:
    """Run what the command line names (default: all); a number behind it is passed on, as in `normalize 10000000`."""
    known = {
        "simulator": simulator.main,
        "capture": capture.main,
        "dagster": dagster.main,
        "normalize": normalize.main,
        "reader": reader.main,
        "replay": replay.main,
        "verify": verify.main,
    }
    numbers = [word for word in sys.argv[1:] if word.isdigit()]
    wanted = [word for word in sys.argv[1:] if word not in numbers] or list(known)
    if unknown := [name for name in wanted if name not in known]:
        sys.exit(f"no such benchmark: {', '.join(unknown)}; one of {', '.join(known)}")
    sys.argv[1:] = numbers
    for name in wanted:
        print(f"\n## {name}\n", flush=True)
        known[name]()


if __name__ == "__main__":
    main()
