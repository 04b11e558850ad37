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
#include "tally.c"
#include "ledger.c"
#include "cells.c"
#include "limits.c"
#include "damage.c"
#include "limiter.c"
#include "bell.c"
#include "lease.c"
#include "counted.c"
#include "moving.c"
#include "wallet.c"
#include "allowance.c"
#include "memo.c"
#include "metric.c"
#include "route.c"
#include "feature.c"
