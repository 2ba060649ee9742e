"""A run as an ordinary Hugging Face folder."""

from so8t.export.merge import ExportError, Report, export

__all__ = ["ExportError", "Report", "export"]
