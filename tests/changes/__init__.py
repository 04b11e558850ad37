"""Limits that change, through the public C API with explicit times, against a reference."""
