/* exports.h - the compiler reads it before unity.c in `make lib`: libfast_shm.so exports the calls of
 * fast_shm.h and nothing else. (Everything is compiled with -fvisibility=hidden, because the Python
 * extension exports none of them.) */
#pragma GCC visibility push(default)
#include "fast_shm.h"
#pragma GCC visibility pop
