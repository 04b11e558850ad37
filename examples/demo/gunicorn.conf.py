"""Settings of the demo's server. In a file, because older releases of gunicorn skip what they do
not know here, and refuse it on the command line."""

workers = 4
worker_class = "sync"
loglevel = "warning"
control_socket_disable = True  # it would leave a folder in the user's home
