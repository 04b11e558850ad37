"""The httpx transports, against a real upstream."""
