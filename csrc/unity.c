/* unity.c - the whole library as one translation unit, so that the hot path is inlined without
 * depending on link-time optimisation. `make lib` and the Python extension compile this file. */
#if defined(__linux__)
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#endif
#include "hash.c"
#include "clock.c"
#include "image.c"
#include "segment.c"
#include "process.c"
#include "ledger.c"
#include "cells.c"
#include "limits.c"
#include "limiter.c"
#include "lease.c"
