/* unity.c - the whole library as one translation unit, so that the hot path is inlined without
 * depending on link-time optimisation. `make lib` and the Python extension compile this file. */
#if defined(__linux__)
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#endif
#include "core/hash.c"
#include "core/clock.c"
#include "core/image.c"
#include "core/segment.c"
#include "core/process.c"
#include "stats/tally.c"
#include "stats/ledger.c"
#include "core/cells.c"
#include "limits/limits.c"
#include "core/damage.c"
#include "limits/limiter.c"
#include "permits/bell.c"
#include "permits/lease.c"
#include "limits/counted.c"
#include "limits/moving.c"
#include "leasing/wallet.c"
#include "leasing/allowance.c"
#include "stats/memo.c"
#include "stats/metric.c"
#include "stats/route.c"
#include "stats/feature.c"
