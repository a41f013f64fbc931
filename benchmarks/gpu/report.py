"""The table at the end of a run."""

from typing import Any


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """All parts' rows as Markdown tables, below what they were measured on."""
    lines = ["# GPU measurements", ""]
    if any(result["dry_run"] for result in results.values()):
        lines += [
            "**A dry run: tiny shapes, to see that everything runs. No number here is a measurement.**",
            "",
        ]
    for name, result in results.items():
        about = result["environment"]
        lines += [f"## {name}", ""]
        if about:
            versions = ", ".join(f"{package} {version}" for package, version in about["versions"].items())
            lines += [f"{about['device']}, driver {about['driver']}, {versions}, {about['date']}", ""]
        if result["error"]:
            lines += [f"**Failed:** {_cell(result['error'])}", ""]
        lines += table(result["rows"])
        if result["left_out"]:
            lines += [f"{result['left_out']} cases were left out for lack of time.", ""]
    return "\n".join(lines)


def complaints(result: dict[str, Any]) -> list[str]:
    """What went wrong in a part: its own error, its cases' errors, and results that are not right."""
    found = [result["error"]] if result["error"] else []
    for row in result["rows"]:
        about = ", ".join(str(value) for value in list(row.values())[:3])
        if "error" in row and isinstance(row["error"], str):
            found.append(f"{about}: {row['error']}")
        elif row.get("ok") is False:
            found.append(f"{about}: not within the tolerance")
    return [" ".join(text.split()) for text in found]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table with all columns that any row has."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    if not columns:
        return []
    head = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*head, *("| " + " | ".join(_cell(row.get(c, "")) for c in columns) + " |" for row in rows), ""]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if value is None:
        return ""
    return " ".join(str(value).split()).replace("|", "\\|")
