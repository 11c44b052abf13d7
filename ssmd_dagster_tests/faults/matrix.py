"""Render the fault matrix from the reports of runs: `python -m ssmd_dagster_tests.faults.matrix REPORTS > FILE`."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from ssmd_dagster_tests.faults import rows_archiver, rows_connector, rows_day, rows_nats
from ssmd_dagster_tests.faults.scenario import SCENARIOS

ROWS = (rows_nats, rows_archiver, rows_day, rows_connector)
ZERO = (
    ("lost_undeclared", "lost undeclared"),
    ("phantoms", "phantoms"),
    ("byte_mismatch", "other bytes"),
    ("duplicates", "twice"),
    ("order_violations", "out of order"),
    ("misfiled", "misfiled"),
    ("ledger_imbalance", "ledger"),
    ("illegal_transitions", "illegal"),
    ("double_transitions", "double"),
    ("cache_differs", "cache ≠ journal"),
)

_HEAD = """# Fault matrix

Written by `make faults` from the `fault_report.json` of every run; not by hand. Each run is a trading day of real processes
(supervisord, NATS, Valkey, connector, archiver, gateway, the simulated exchange) in which one thing is broken, with a seed that
draws moments and places. The exchange's log of the truth, the archive's bytes, the journal and the cache judge it.

Counts are sums over the runs. Every count from *lost undeclared* to *cache ≠ journal* must be 0. *Declared* are frames that
the exchange sent while no socket of ours was up, inside a gap of the journal. *RTO* is the longest time from the fault until
frames got from the exchange to the archiver again, *seen* the longest until the day's status or a heartbeat said so, the
time for which the fault lasted included. *Misfiled* reads – where the runs made no tables.
"""


def load(reports: Path) -> list[dict[str, Any]]:
    """Return all reports below a folder."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(reports.glob("**/fault_report.json"))]


def render(found: list[dict[str, Any]]) -> str:
    """Return the page."""
    by_scenario: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in found:
        if "scenario" in report:
            by_scenario[report["scenario"]].append(report)
    runs = sum(map(len, by_scenario.values()))
    green = sum(report["result"] == "green" for reports in by_scenario.values() for report in reports)
    lines = [_HEAD, f"{runs} runs, {green} green, on Python {platform.python_version()}, {platform.system()}.", ""]
    names = " | ".join(title for _, title in ZERO)
    lines += [
        f"| row | fault | expected | runs | result | sent | {names} | declared | RTO s | seen s |",
        f"|---|---|---|---|---|---|{'---|' * len(ZERO)}---|---|---|",
    ]
    for chosen in sorted(SCENARIOS, key=lambda each: (_order(each.row), each.name)):
        lines.append(_line(chosen.row, chosen.fault, chosen.expected, by_scenario.get(chosen.id, [])))
    red = [report for reports in by_scenario.values() for report in reports if report["result"] != "green"]
    if red:
        lines += ["", "## Not green", ""]
        lines += [f"- {r['scenario']}, seed {r['seed']}: {r['result']}: {_short(r['error'])}" for r in red]
    for report in (report for report in found if report["row"] == "chaos"):
        lines += ["", *_chaos(report)]
    return "\n".join(lines) + "\n"


def _order(row: str) -> tuple[str, int]:
    return "CNADW".index(row[0]), int(re.sub(r"\D", "", row))  # type: ignore[return-value]


def _line(row: str, fault: str, expected: str, reports: list[dict[str, Any]]) -> str:
    judged = [report["checks"] for report in reports if report.get("checks")]
    results = [report["result"] for report in reports]
    result = (
        "not run"
        if not results
        else f"red {results.count('red')}"
        if "red" in results
        else "skipped"
        if "skipped" in results
        else "green"
    )
    cells = [row, fault, expected, str(len(reports)), result, f"{sum(check['sent'] for check in judged):,}"]
    for name, _ in ZERO:
        values = [check[name] for check in judged if check[name] is not None]
        cells.append(str(sum(values)) if values else "–")
    cells.append(f"{sum(check['lost_declared'] for check in judged):,}")
    for name in ("rto_s", "detect_s"):
        values = [report[name] for report in reports if report.get(name) is not None]
        cells.append(f"{max(values):.1f}" if values else "–")
    return f"| {' | '.join(cells)} |"


def _short(text: str | None) -> str:
    return " ".join((text or "").split())[:300]


def _chaos(report: dict[str, Any]) -> list[str]:
    checks = report["checks"]
    kills = ", ".join(f"{name} {count}" for name, count in sorted(report["kills"].items()))
    zero = ", ".join(f"{title} {checks[name]}" for name, title in ZERO if checks[name] is not None)
    told = (
        f"{sum(report['kills'].values())} kills ({kills}), {report['recoveries']} recoveries. {checks['sent']:,} frames sent, "
        f"{checks['archived']:,} archived, {checks['lost_declared']:,} lost and declared; {zero}. Without a connection "
        f"{checks['down_s']:g} s of the day's window, of which undeclared {checks['undeclared_s']:g} s; gaps cover "
        f"{checks['declared_s']:g} s."
    )
    return [f"## Chaos, {report['minutes']:g} minutes, seed {report['seed']}: {report['result']}", "", told]


def main() -> None:
    """Print the page."""
    sys.stdout.write(render(load(Path(sys.argv[1]))))


if __name__ == "__main__":
    main()
