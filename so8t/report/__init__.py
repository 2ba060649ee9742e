"""A run as one page for the browser."""

from so8t.report.page import write_report

__all__ = ["write_report"]
