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
#include "core/lock_file.c"
#include "core/liveness.c"
#include "core/process.c"
#include "core/leader.c"
#include "stats/counters.c"
#include "stats/key_stats.c"
#include "core/hash_table.c"
#include "limits/limits.c"
#include "limits/limit_changes.c"
#include "core/damage.c"
#include "limits/shared_counters.c"
#include "limits/limiter.c"
#include "permits/wait_queue.c"
#include "permits/semaphore.c"
#include "limits/per_call.c"
#include "limits/moving_window.c"
#include "leasing/token_lease.c"
#include "leasing/permit_lease.c"
#include "stats/token_memo.c"
#include "stats/histogram.c"
#include "stats/deployments.c"
#include "stats/feature_errors.c"
