"""Dagster's side: how long the definitions take to load, by number of environments, and what an idle stack costs.

Loading is measured in a process of its own, imports included, in CPU time: it reads a few files and waits for nothing.
`--idle SECONDS` also brings a whole house up and measures the CPU time of each of its processes while no day runs.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from ssmd_dagster_tests.environments.folders import changed, copied
from ssmd_dagster_tests.house import House

LOAD = """
import time
began = time.process_time()
import dagster as dg
imported = time.process_time()
from pathlib import Path
from ssmd_dagster.defs.build import build_definitions
from ssmd_dagster.environments.loader import load_registry
registry = load_registry(Path({folder!r}))
repository = build_definitions(registry).get_repository_def()
repository.load_all_definitions()
ended = time.process_time()
print(len(repository.get_all_jobs()), imported - began, ended - imported)
"""


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--idle", type=float, default=0.0, help="measure an idle house for so many seconds")
    options = parser.parse_args()
    print("| environments | jobs | import dagster | import and load ours |\n|---:|---:|---:|---:|")
    for count in (1, 10, 50):
        jobs, imported_s, loaded_s = _loaded(count)
        print(f"| {count} | {jobs} | {imported_s:.1f} s | {loaded_s:.1f} s |", flush=True)
    if options.idle:
        print("\n| process | share of a core |\n|---|---:|")
        shares = _idle(options.idle)
        for name, share in sorted(shares.items()):
            print(f"| {name} | {share:.1%} |")
        print(f"| all | {sum(shares.values()):.1%} |")


def _loaded(count: int) -> tuple[int, float, float]:
    """Return the number of jobs and the seconds of importing Dagster and of loading `count` environments."""
    with tempfile.TemporaryDirectory() as home:
        folder = copied(Path(home))
        environments = folder / "environments"
        text = (environments / "kalshi-prod.yaml").read_text()
        for path in environments.iterdir():
            path.unlink()
        for number in range(count):
            path = environments / f"copy-{number}.yaml"
            path.write_text(text)
            buckets = {"raw": f"raw-{number}", "normalized": f"normalized-{number}"}
            changed(path, {"name": path.stem, "enabled": True, "storage.buckets": buckets})
        done = subprocess.run(
            [sys.executable, "-c", LOAD.format(folder=str(folder))], capture_output=True, text=True, check=True
        )
    jobs, imported_s, loaded_s = done.stdout.split()
    return int(jobs), float(imported_s), float(loaded_s)


def _idle(seconds: float) -> dict[str, float]:
    """Return the share of a core that each process of an idle house takes."""
    with tempfile.TemporaryDirectory() as folder:
        house = House.build(Path(folder))
        house.add("idle", simulator={"seed": 7, "markets": 200, "rate_per_second": 500})
        try:
            house.ssmd("up", "idle", "--detach")
            time.sleep(30)
            before, began = _times(house), time.monotonic()
            time.sleep(seconds)
            after, took_s = _times(house), time.monotonic() - began
        finally:
            house.down()
    shares: dict[str, float] = {}
    for pid, (name, used_s) in after.items():
        shares[name] = shares.get(name, 0.0) + (used_s - before.get(pid, (name, used_s))[1]) / took_s
    return shares


def _times(house: House) -> dict[int, tuple[str, float]]:
    found: dict[int, tuple[str, float]] = {}
    words = {
        "supervisord": "supervisord", "nats-server": "NATS", "valkey": "cache", "ssmd_dagster.simulator": "simulated exchange",
        "_daemon": "daemon", "webserver": "webserver", "code_server": "code server", "api grpc": "code server's child",
    }  # fmt: skip
    for process in psutil.process_iter(["cmdline"]):
        try:
            if process.environ().get("SSMD_HOME") != str(house.home):
                continue
            times = process.cpu_times()
            line = " ".join(process.info["cmdline"] or [])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        name = next((name for word, name in words.items() if word in line), "other")
        found[process.pid] = name, times.user + times.system
    return found


if __name__ == "__main__":
    main()
