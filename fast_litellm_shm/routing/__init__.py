"""Routing between deployments, by what all workers know of them."""
