"""Benchmarks: one file for each question; ``python -m bench`` runs them all."""
