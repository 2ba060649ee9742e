"""Analyse the saved logits of a run: scores a step, changes between steps, what became of each row; or export them.

    python -m so8t.analyze runs/default
    python -m so8t.analyze runs/default --json > analysis.json         # inf and NaN become null
    python -m so8t.analyze runs/default --compare 120 200              # two saved steps
    python -m so8t.analyze runs/default --export safetensors exported  # or cartography, or kd-jsonl
    python -m so8t.analyze runs/default --verify                       # is every file as it was written?

A number in the tables is exact; a range (0.19..0.21, or >=0.19) is all that the form of the file lets anyone know.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from so8t import cli
from so8t.config import InputError


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("python -m so8t.analyze", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the output_dir of a run, or a folder of saved logits")
    parser.add_argument("--json", action="store_true", help="print all numbers as one JSON object")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--compare", nargs=2, type=int, metavar=("EARLIER", "LATER"), help="two saved steps")
    instead.add_argument(
        "--export", nargs=2, metavar=("FORMAT", "OUT"), help="FORMAT is cartography, safetensors or kd-jsonl"
    )
    instead.add_argument(
        "--verify", action="store_true", help="hold every file against its checksums; exit 1 if damaged"
    )
    options = parser.parse_args(arguments)
    if options.json and (options.export or options.verify):
        parser.error("--json goes with the analysis and with --compare only")
    return cli.run("so8t.analyze", lambda: _command(options))


def _command(options: argparse.Namespace) -> int:
    # here, because torch takes seconds that --help need not wait for
    from so8t.analyze.run import analyze, compare_steps, verify
    from so8t.analyze.tables import comparison_to_text, to_text

    if options.export:
        print(_export(options.run, *options.export))
    elif options.verify:
        lines, all_whole = verify(options.run)
        print(*lines, sep="\n")
        return 0 if all_whole else 1
    elif options.compare:
        comparison = compare_steps(options.run, *options.compare)
        print(json.dumps(_finite(asdict(comparison))) if options.json else comparison_to_text(comparison))
    else:
        analysis = analyze(options.run)
        print(json.dumps(_finite(asdict(analysis))) if options.json else to_text(analysis))
    return 0


def _export(run: Path, name: str, out: str) -> str:
    from so8t.analyze.formats import EXPORTS
    from so8t.analyze.run import logits_folder, records_of

    if name not in EXPORTS:
        raise InputError(f"--export: there is no format {name}; write one of {', '.join(EXPORTS)}")
    path = Path(out)
    if path.exists():
        raise InputError(f"--export: {path} exists already; write a name that is free")
    if not path.parent.is_dir():
        raise InputError(f"--export: there is no folder {path.parent} to write {path.name} into")
    paths = [file for record in records_of(logits_folder(run)) for file in record.paths]
    return EXPORTS[name](paths, path)


def _finite(value: Any) -> Any:
    """The same with None in the place of inf and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
