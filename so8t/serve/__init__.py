"""Answers over HTTP: the final leaves, the thinking never does."""
