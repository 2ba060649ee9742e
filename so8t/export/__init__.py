"""A run as an ordinary Hugging Face folder."""

from typing import TYPE_CHECKING

from so8t import cli

__all__ = ["ExportError", "export"]

if TYPE_CHECKING:
    from so8t.export.merge import ExportError, export
else:
    __getattr__ = cli.on_demand(__name__, __all__, "merge")
