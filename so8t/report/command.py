"""One page about a run, to open in any browser: its curves, what the model predicted, and the token map.

    python -m so8t.report runs/default               # writes runs/default/report.html
    python -m so8t.report runs/default runs/slow     # both beside each other: runs/default/report_beside_slow.html

Everything is in that file; it needs no network and no server.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from so8t import cli


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m so8t.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="the training.output_dir of a run")
    parser.add_argument("other", nargs="?", type=Path, help="a second run to compare it with")
    options = parser.parse_args(arguments)

    def command() -> int:
        from so8t.report.page import write_report  # here, because torch takes seconds that --help need not wait for

        path = write_report(options.run, options.other)
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, open it in a browser")
        return 0

    return cli.run("so8t.report", command)
