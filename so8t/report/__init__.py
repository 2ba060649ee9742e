"""A run, or two, as one page for the browser."""

from typing import TYPE_CHECKING

from so8t import cli

__all__ = ["write_report"]

if TYPE_CHECKING:
    from so8t.report.page import write_report
else:
    __getattr__ = cli.on_demand(__name__, __all__, "page")
