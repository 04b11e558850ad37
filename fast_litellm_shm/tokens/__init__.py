"""Counting tokens, and what models cost."""
