"""`pi05 VERB`: one small file per verb, imported only when asked for.

A verb's module has HELP (a line), `add_arguments(parser)` and `run(args) -> Report`. The report's JSON is the last
line on standard output. Exit status: 0 every gate held, 1 a gate failed or the run broke, 2 wrong use or a
backend or device that is not there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from pi05_ros import __version__
from pi05_ros.cli.report import Report, console
from pi05_ros.errors import BackendError, ConfigError, Pi05Error

VERBS = ("benchmark", "build", "collect", "conformance", "coverage", "demo", "engines", "evaluate", "export", "infer",
         "inspect", "quantize", "record", "replay", "sensitivity", "soak", "train", "validate", "validate-quantized")


def build_parser(verb: str | None) -> argparse.ArgumentParser:
    """The parser; only the module of `verb` is imported, or all of them where help is asked for without a verb."""
    parser = argparse.ArgumentParser(prog="pi05", description="pi0.5 on a real robot: run, measure, inspect.")
    parser.add_argument("--version", action="version", version=f"pi05_ros {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name in VERBS:
        if verb not in (name, "help"):
            verbs.add_parser(name)
            continue
        module = importlib.import_module(f"pi05_ros.cli.{name.replace('-', '_')}")
        sub = verbs.add_parser(name, help=module.HELP, description=module.HELP + "\n\n" + (module.__doc__ or ""),
                               formatter_class=argparse.RawDescriptionHelpFormatter)
        sub.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON object to FILE")
        module.add_arguments(sub)
        sub.set_defaults(run=module.run)
    return parser


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    verb = next((word for word in argv if word in VERBS), "help" if {"-h", "--help"} & set(argv) else None)
    args = build_parser(verb).parse_args(argv)
    try:
        report = args.run(args)
    except Pi05Error as error:
        console.print(f"[bold red]{type(error).__name__}[/]", highlight=False)
        console.print(str(error), highlight=False, markup=False, soft_wrap=True)
        report = Report(ok=False, data={"error": type(error).__name__, "message": str(error)},
                        exit_code=2 if isinstance(error, (ConfigError, BackendError)) else 1)
    except Exception as error:  # a defect: the traceback for a person, the JSON line for a program
        console.print_exception()
        report = Report(ok=False, data={"error": type(error).__name__, "message": str(error)})
    line = json.dumps({"verb": args.verb, "ok": report.ok, **report.data})
    print(line, flush=True)
    if args.json:
        try:
            args.json.write_text(line + "\n")
        except OSError as error:
            console.print(f"--json {args.json}: expected a file that can be written, received: {error}", markup=False)
            return 2
    return report.exit_code if report.exit_code is not None else int(not report.ok)
