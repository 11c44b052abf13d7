"""Write `docs/day-states.md` from the state table. Run it after changing `ssmd_dagster/day/states.py`."""

from __future__ import annotations

from pathlib import Path

from ssmd_dagster.day.states import states_document

if __name__ == "__main__":
    path = Path(__file__).resolve().parents[1] / "docs" / "day-states.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text(states_document(), encoding="utf-8")
