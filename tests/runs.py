"""What was run with which versions, as tables: ``python -m tests.runs`` writes them into the page.

The data is docs/contributors/runs.toml, which people write.
"""

from __future__ import annotations

import tomllib
from typing import Any

from tests.__main__ import ROOT

DATA = ROOT / "docs" / "contributors" / "runs.toml"
PAGE = ROOT / "docs" / "contributors" / "following.md"
BEGIN, END = "<!-- from runs.toml -->\n", "<!-- end -->"
COLUMNS = ("vllm", "transformers", "torch", "hardware", "date", "command", "result", "evidence")


def runs() -> list[dict[str, Any]]:
    """The data's rows."""
    return list(tomllib.loads(DATA.read_text(encoding="utf-8"))["run"])


def matrix() -> str:
    """How many runs there are of which versions on what, in Markdown."""
    places = sorted({str(run["hardware"]) for run in runs()})
    lines = [f"| vLLM | Transformers | {' | '.join(places)} |", "|" + (2 + len(places)) * " --- |"]
    for versions in dict.fromkeys((run["vllm"], run["transformers"]) for run in runs()):
        cells = list(versions)
        for place in places:
            of = (*versions, place)
            days = [
                run["date"]
                for run in runs()
                if (run["vllm"], run["transformers"], run["hardware"]) == of
            ]
            cells.append(f"{len(days)}, last {max(days)}" if days else "not run")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def table() -> str:
    """The rows in Markdown."""
    lines = [
        "| vLLM | Transformers | torch | on | date | command | result | more |",
        "|" + 8 * " --- |",
    ]
    for run in runs():
        cells = {name: str(run.get(name, "")) for name in COLUMNS}
        cells["command"] = f"`{cells['command']}`"
        if name := cells["evidence"]:
            cells["evidence"] = f"[{name.removesuffix('.md')}](../evidence/{name})"
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The page with the table as it should be."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{matrix()}\n{table()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
