"""One page about a run, to open in any browser: its curves, what the model predicted, and the token map.

    python -m so8t.report runs/default               # writes runs/default/report.html
    python -m so8t.report runs/default runs/slow     # both beside each other: runs/default/report_beside_slow.html

Everything is in that file; it needs no network and no server.
"""

from collections.abc import Sequence
from pathlib import Path

from so8t import cli
from so8t.text import size_of


def main(arguments: Sequence[str] | None = None) -> int:
    parser = cli.parser("python -m so8t.report", __doc__)
    parser.add_argument("run", type=Path, help="the training.output_dir of a run")
    parser.add_argument("other", nargs="?", type=Path, help="a second run to compare it with")
    options = parser.parse_args(arguments)

    def command() -> int:
        from so8t.report.page import write_report  # here, because torch takes seconds that --help need not wait for

        path = write_report(options.run, options.other)
        cli.say(f"{path}: {size_of(path.stat().st_size)}, open it in a browser")
        return 0

    return cli.run("so8t.report", command)
