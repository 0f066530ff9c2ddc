"""How benchmarks.tune writes kernels/measured.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.tune_cases import Config, Entry

TABLES = Path(__file__).parents[1] / "kernels" / "measured.py"
NAMES = ("PRODUCTS", "VENDOR", "ATTENTION", "ROWS")


def render(provenance: dict[str, str], tables: dict[str, dict[Any, Any]], source: str) -> str:
    """``source``, kernels/measured.py, with other contents of its tables."""
    values: dict[str, dict[Any, Any]] = {"PROVENANCE": provenance, **tables}
    lines, skipping = [], False
    for line in source.splitlines():
        name = line.split(":")[0]
        if name in values and line.endswith(("= {", "= {}")):
            start = line.removesuffix("{").removesuffix("{}")
            lines += [f"{start}{{"] if values[name] else [f"{start}{{}}"]
            for key, value in sorted(values[name].items()):
                if isinstance(value, str):
                    lines.append(f"    {_quoted(key)}: {_quoted(value)},")
                    continue
                shown = ", ".join(_quoted(k) if isinstance(k, str) else str(k) for k in key)
                if isinstance(value, float):
                    lines.append(f"    ({shown}): {value:.3g},")
                    continue
                lines += [f"    ({shown}): Measured("]
                lines += [f"        blocks={value.blocks},", f"        was={value.was},"]
                lines += [f"        ratio={value.ratio:.3g},", "    ),"]
            if values[name]:
                lines.append("}")
            skipping = line.endswith("{")
        elif not skipping:
            lines.append(line)
        elif line == "}":
            skipping = False
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "/").replace('"', "'") + '"'


def updated(
    target: str,
    note: str,
    chosen: dict[Entry, tuple[Config, float]],
    vendor: dict[Entry, float],
) -> tuple[Any, Any]:
    """What kernels/measured.py holds, with ``chosen`` in it, and times over the library's."""
    from benchmarks.tune_cases import blocks
    from qvlfast.kernels import measured

    tables = {name: dict(getattr(measured, name)) for name in NAMES}
    for entry, (config, ratio) in chosen.items():
        made = measured.Measured(blocks(config), blocks(entry.now), float(f"{ratio:.3g}"))
        tables[entry.table][entry.key] = made
    for entry, ratio in vendor.items():
        _, own, rows, _ = entry.key
        tables["VENDOR"][own, rows] = float(f"{ratio:.3g}")
    return {**measured.PROVENANCE, target: note}, tables
