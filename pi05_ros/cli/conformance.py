"""Every file is an .npz of recorded inputs and outputs (test/data/conformance/README.md describes the layout)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pi05_ros.cli.report import Report, console, table

HELP = "compare our forward with recorded runs of the reference implementation"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--weights", type=Path, help="checkpoint to load instead of the recipe's weights")
    parser.add_argument("--backend", default="eager", metavar="NAME",
                        help="another than eager is compared by what its stages hand on: image features, K, V, actions")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> Report:
    from pi05_ros.backends.base import check_device
    from pi05_ros.benchmark.backend_conformance import compare_backend
    from pi05_ros.benchmark.conformance import compare

    device = check_device(args.device)
    cases: dict[str, dict[str, Any]] = {}
    rows, hidden = [], set[str]()
    for path in args.files:
        if args.backend == "eager":
            results, inside = compare(path, args.weights, str(device)), list[str]()
        else:
            results, inside = compare_backend(path, args.backend, args.weights, device)
        hidden.update(inside)
        worst = max(results, key=lambda r: r.error / r.gate)
        actions = max((r.error for r in results if "actions" in r.name or "/" in r.name), default=float("nan"))
        ok = all(r.ok for r in results)
        rows.append((path.stem, len(results), f"{actions:.1e}", f"{worst.name} {worst.error:.1e}", f"{worst.gate:.0e}",
                     "yes" if ok else "NO"))
        cases[path.name] = {"ok": ok, "errors": {r.name: r.error for r in results},
                            "gates": {r.name: r.gate for r in results}, "not_compared": inside}
    columns = ("file", "tensors", "actions", "nearest to its gate", "gate", "ok")
    table("Relative error against the reference", columns, rows)
    if hidden:
        console.print(f"not compared, because it is inside a stage of {args.backend}: {', '.join(sorted(hidden))}",
                      highlight=False)
    failed = [name for name, case in cases.items() if not case["ok"]]
    for name in failed:
        bad = {k: v for k, v in cases[name]["errors"].items() if not v <= cases[name]["gates"][k]}
        console.print(f"{name}: above the gate: {bad}", highlight=False)
    return Report(ok=not failed, data={"cases": cases})
