/* token_lease.h - token leases, for other files. */
#ifndef FSHM_TOKEN_LEASE_H
#define FSHM_TOKEN_LEASE_H

#include "../core/internal.h"

/* For how many ns these costs are refused; 0: they are not. */
uint64_t token_lease_refused_ns(const fshm_limiter *l, uint64_t hash, const uint64_t *costs,
                                uint64_t now);

#endif
