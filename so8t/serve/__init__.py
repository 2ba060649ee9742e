"""Answers over HTTP: the final leaves, the thinking never does."""

from typing import TYPE_CHECKING

from so8t import cli

__all__ = ["Generator", "Question", "Written", "load_generator"]

if TYPE_CHECKING:
    from so8t.serve.generate import Generator, load_generator
    from so8t.serve.thinker import Question, Written
else:
    __getattr__ = cli.on_demand(__name__, __all__, "generate", "thinker")
