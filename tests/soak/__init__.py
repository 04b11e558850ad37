"""What the application of ``make soak`` has, for those that ask it."""

PATIENCE = 30.0  # seconds that a request waits for its turn
PATHS = ("/rate", "/permits", "/quota", "/pool", "/limited", "/flight")
# Of those that hold something, how much there is.
MOST = {"/permits": 4, "/quota": 4, "/pool": 5, "/flight": 4}
KEY, ENDPOINT = "everybody", "http://soak.example"
