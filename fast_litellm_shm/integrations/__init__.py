"""Adapters for other libraries. Each module imports the library that it adapts to."""
