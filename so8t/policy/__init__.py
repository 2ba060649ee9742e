"""Which rows may be trained on."""

from so8t.policy.rules import RULES, PolicyReport, broken_rule, files_read, make_report, read_report

__all__ = ["RULES", "PolicyReport", "broken_rule", "files_read", "make_report", "read_report"]
