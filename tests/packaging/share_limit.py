"""Uses libfast_shm.so with nothing but ctypes: no package, no cffi. Prints how many were admitted.

Arguments: the library, a segment name, a limiter name, n, per in nanoseconds, attempts.
"""

import ctypes
import sys


class Limit(ctypes.Structure):
    """fshm_limit."""

    _fields_ = [
        ("n", ctypes.c_uint64),
        ("per_ns", ctypes.c_uint64),
        ("burst", ctypes.c_uint64),
        ("kind", ctypes.c_uint32),
        ("strict", ctypes.c_uint32),
    ]


CREATE, WINDOW, OK, ALLOWED = 1, 1, 1, 1

library, segment_name, limiter_name, n, per_ns, attempts = sys.argv[1:]
fshm = ctypes.CDLL(library)
fshm.fshm_is_allowed.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64]

segment, limiter = ctypes.c_void_p(), ctypes.c_void_p()
error = ctypes.create_string_buffer(4096)  # an fshm_error, and more
status = fshm.fshm_open(
    segment_name.encode(), ctypes.c_uint64(0), 0o600, CREATE, ctypes.byref(segment), error
)
assert status == OK, f"fshm_open: {status}"

limit = Limit(int(n), int(per_ns), 0, WINDOW, 0)
name = limiter_name.encode()
status = fshm.fshm_limiter_open(
    segment, name, ctypes.c_uint64(len(name)), ctypes.byref(limit), 1, ctypes.byref(limiter)
)
assert status == OK, f"fshm_limiter_open: {status}"

print("ready", flush=True)
sys.stdin.readline()  # both sides begin together
print(sum(fshm.fshm_is_allowed(limiter, b"user-1", 6) == ALLOWED for _ in range(int(attempts))))

fshm.fshm_limiter_close(limiter)
fshm.fshm_close(segment)
assert not {"cffi", "fast_litellm_shm"} & sys.modules.keys()
