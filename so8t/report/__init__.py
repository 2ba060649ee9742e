"""A run, or two, as one page for the browser."""
