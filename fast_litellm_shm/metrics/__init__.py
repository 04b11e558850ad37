"""Metrics of a host, its health, and advice."""
