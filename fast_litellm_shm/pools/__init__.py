"""Connection pools whose limits all workers share."""
