"""Which rows may be trained on."""

from so8t.policy.rules import REPORT_FILE, RULES, PolicyReport, broken_rule, make_report, read_report

__all__ = ["REPORT_FILE", "RULES", "PolicyReport", "broken_rule", "make_report", "read_report"]
