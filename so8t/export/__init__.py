"""A run as an ordinary Hugging Face folder."""
