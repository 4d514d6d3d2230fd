"""Properties on fixed examples, and the composition matrix at the end of a run that checked it."""

import json
import pathlib

import hypothesis

hypothesis.settings.register_profile("diffopt", derandomize=True, deadline=None)
hypothesis.settings.load_profile("diffopt")

RECORD = pathlib.Path(__file__).parents[1] / "docs" / "_generated" / "composition"
MARKS = {"right": ".", "raises": "r", "wrong": "X"}


def pytest_terminal_summary(terminalreporter):
    ran = [r.nodeid for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ())]
    rows = [json.loads(path.read_text()) for path in sorted(RECORD.glob("*.json"))]
    rows = [row for row in rows if any(f"[{row['name']}]" in name or f"[{row['name']}, whole]" in name for name in ran)]
    if not rows:
        return
    cells = [status for row in rows for status, _ in row["cells"].values()]
    width = max(len(row["name"]) for row in rows)
    terminalreporter.section("composition matrix: . right, r raises with advice")
    for row in rows:
        line = "".join(MARKS[status] for status, _ in row["cells"].values())
        terminalreporter.line(f"{row['name']:{width}}  {line}")
    counts = ", ".join(f"{cells.count(status)} {status}" for status in MARKS)
    terminalreporter.line(f"{len(rows)} operators, {len(cells)} cells: {counts}")
