/* py_cluster.h - calls of a limiter whose quota a server grants: fshm_spend() answers nearly all of them, and Python
 * the rest. Included by py_rate_limiter.c. */
#ifndef FSHM_PY_CLUSTER_H
#define FSHM_PY_CLUSTER_H

#include "py_args.h"

/* Set once, by _bind_cluster(). */
typedef struct {
  fshm_limiter *leases, *refused; /* token or permit leases; NULL: a limiter of this host alone */
  PyObject *leases_handle, *refused_handle; /* own them */
  PyObject *keys; /* of a limiter of permits: dict of the keys in use, else NULL */
} cluster_t;

/* _ask(op, key, cost) -> (status, limit_index, remaining, retry_after_ns, reset_after_ns). cost None: 1. */
static int cluster_ask(PyObject *self, uint32_t op, PyObject *key, PyObject *cost,
                       fshm_decision *d) {
  long long retry, reset;
  unsigned long long remaining;
  uint64_t version = d->version;
  PyObject *r = PyObject_CallMethod(self, "_ask", "IOO", op, key, cost ? cost : Py_None);
  if (!r) return -1;
  memset(d, 0, sizeof *d);
  int parsed =
      PyArg_ParseTuple(r, "iHKLL", &d->status, &d->limit_index, &remaining, &retry, &reset);
  Py_DECREF(r);
  if (!parsed) return -1;
  d->version = version;
  d->remaining = remaining;
  d->retry_after_ns = retry;
  d->reset_after_ns = reset;
  return 0;
}

/* out NULL: only the status. Returns it, or FSHM_ASK after an exception. */
static int cluster_decide(PyObject *self, const cluster_t *c, fshm_limiter *limits, uint32_t op,
                          PyObject *key, const key_arg *k, PyObject *cost, const uint64_t *costs,
                          fshm_decision *out, uint64_t version) {
  uint32_t low = 0;
  fshm_decision asked = {0};
  int status = FSHM_ASK;
  if (op == FSHM_ACQUIRE)
    status = fshm_spend(c->leases, c->refused, limits, k->bytes, (uint64_t)k->length, costs, 0, out,
                        &low);
  if (status == FSHM_ASK) {
    asked.version = version;
    if (cluster_ask(self, op, key, cost, &asked)) return FSHM_ASK;
    if (out) *out = asked;
    return asked.status;
  }
  if (low && done(PyObject_CallMethod(self, "_low", "OO", key, cost ? cost : Py_None)))
    return FSHM_ASK;
  return status;
}

/* The agent that reports to the server must know each key whose permits are held: _note(key). */
static int cluster_note(PyObject *self, const cluster_t *c, PyObject *key) {
  int known = PyDict_Contains(c->keys, key);
  if (likely(known > 0)) return 0;
  return known ? -1 : done(PyObject_CallMethod(self, "_note", "O", key));
}

/* _grant(key, tries). More than 0: the permits that may be held without the server. 0: retry. -1: denied until a
 * release. Below -1: denied for that many ns. */
static int cluster_grant(PyObject *self, PyObject *key, int tries, long *alone) {
  PyObject *r = PyObject_CallMethod(self, "_grant", "Oi", key, tries);
  if (!r) return -1;
  *alone = PyLong_AsLong(r);
  Py_DECREF(r);
  return *alone == -1 && PyErr_Occurred() ? -1 : 0;
}

#define GRANT_TRIES 6 /* another process may take a permit just granted */

/* 0, or -1: an exception. The key is noted before the permit is taken, and again afterwards: in between, the agent
 * may look at the keys in use and forget a key without permits held. */
static int cluster_admit(PyObject *self, const cluster_t *c, fshm_limiter *limits, PyObject *key,
                         const key_arg *k, fshm_permit *permit, fshm_decision *d,
                         uint32_t *in_flight) {
  long alone = 0;
  for (int tries = 0;; tries++) {
    int status =
        fshm_permit_lease_admit(limits, c->leases, c->refused, k->bytes, (uint64_t)k->length,
                                (uint32_t)alone, 0, permit, d, in_flight);
    if (status != FSHM_ASK || alone < 0) break;
    if (tries == GRANT_TRIES)
      alone = -1;
    else if (cluster_grant(self, key, tries, &alone))
      return -1;
    if (alone >= 0) continue;
    d->status = FSHM_DENIED;
    d->retry_after_ns = alone < -1 ? -(int64_t)alone : 0; /* 0: when a holder releases */
    *in_flight = fshm_in_flight(limits, k->bytes, (uint64_t)k->length);
    break;
  }
  if (d->status != FSHM_ALLOWED || !cluster_note(self, c, key)) return 0;
  (void)fshm_permit_release(limits, permit);
  return -1;
}

#endif
