"""What PyPI's fast-litellm offers: simple classes, its patch of litellm, its feature flags."""
