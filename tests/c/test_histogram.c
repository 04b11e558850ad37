/* test_histogram.c - histograms: quantiles within 5 %, sums of several processes, names, a full table. */
#include "../../csrc/unity.c"

#include "check.h"

#include <math.h>

#define PARTIES 8 /* more than shards */
#define RECORDS 20000
#define TOGETHER 200000 /* of each process: longer than a time slice */
#define MOST_NS (UINT64_C(1) << 40)

static const char *shared_name;

static int open_metric(fshm_segment *s, const char *component, const char *operation) {
  return fshm_metric_open(s, component, strlen(component), operation, strlen(operation));
}

static int compare_u64(const void *a, const void *b) {
  const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
  return x < y ? -1 : x > y;
}

static void check_near(double found, double truth) {
  CHECK(found >= truth * 0.95 && found <= truth * 1.05);
  if (found < truth * 0.95 || found > truth * 1.05)
    fprintf(stderr, "  found %.1f, truth %.1f\n", found, truth);
}

static void test_buckets(void) {
  CHECK_EQ(duration_bucket(0), 0);
  CHECK_EQ(duration_bucket(63), 0);
  CHECK_EQ(duration_bucket(64), 0);
  CHECK_EQ(duration_bucket(UINT64_MAX), DURATIONS - 1);
  for (uint32_t i = 1; i < DURATIONS; i++) {
    double begins = bucket_begins(i);
    CHECK(bucket_begins(i - 1) < begins);
    /* the first whole ns that belongs to it, where there is one of its own */
    uint64_t first = (uint64_t)begins + ((double)(uint64_t)begins < begins);
    if ((double)first < bucket_begins(i + 1)) CHECK_EQ(duration_bucket(first), i);
    CHECK_OP(duration_bucket(first - 1), <, i);
  }
  for (int n = 0; n < 200000; n++) { /* any duration by itself is its own quantile, within 5 % */
    uint64_t ns = random_scaled(64, MOST_NS - 1), buckets[DURATIONS] = {0};
    buckets[duration_bucket(ns)] = 1;
    double q = duration_quantile(buckets, 1, 0, 1e300, 0.5);
    if (q < (double)ns * 0.95 || q > (double)ns * 1.05) check_near(q, (double)ns);
  }
  CHECK(duration_quantile((uint64_t[DURATIONS]){0}, 0, 0, 0, 0.5) <= 0);
}

/* Against the sorted durations themselves, of several shapes. */
static void test_quantiles(fshm_segment *s) {
  static uint64_t ns[RECORDS];
  const char *const shapes[] = {"spread", "narrow", "two", "one"};
  for (int shape = 0; shape < 4; shape++) {
    int m = open_metric(s, "shape", shapes[shape]);
    fshm_metric_info info;
    uint64_t sum = 0, errors = 0, in = 0;
    for (int i = 0; i < RECORDS; i++) {
      ns[i] = shape == 0   ? random_scaled(64, MOST_NS - 1)
              : shape == 1 ? 1000000 + random_below(1000000)
              : shape == 2 ? (i % 10 ? 2000 : 5000000) + random_below(100)
                           : 123456;
      int error = random_below(7) == 0;
      sum += ns[i];
      errors += (uint64_t)error;
      in += (uint64_t)i;
      fshm_metric_record(s, (uint32_t)m, ns[i], 1, !error, (uint64_t)i, 1);
    }
    qsort(ns, RECORDS, sizeof *ns, compare_u64);
    CHECK_EQ(fshm_metric_at(s, (uint32_t)m, &info), FSHM_OK);
    CHECK_EQ(info.calls, RECORDS);
    CHECK_EQ(info.sum_ns, sum);
    CHECK_EQ(info.errors, errors);
    CHECK_EQ(info.size_in, in);
    CHECK_EQ(info.size_out, RECORDS);
    CHECK_EQ(info.least_ns, ns[0]);
    CHECK_EQ(info.most_ns, ns[RECORDS - 1]);
    check_near(info.p50_ns, (double)ns[RECORDS / 2 - 1]);
    check_near(info.p95_ns, (double)ns[RECORDS * 95 / 100 - 1]);
    check_near(info.p99_ns, (double)ns[RECORDS * 99 / 100 - 1]);
    CHECK_EQ(memcmp(info.name, "shape", 6), 0);
    CHECK_EQ(info.component_length, 5);
    CHECK_EQ(info.name_length, 6 + strlen(shapes[shape]));
  }
}

/* Two metrics as one: half of the calls take 1 us, half 1 ms. */
static void test_sum(fshm_segment *s) {
  uint32_t both[] = {(uint32_t)open_metric(s, "sum", "quick"),
                     (uint32_t)open_metric(s, "sum", "slow"), METRICS, UINT32_MAX};
  fshm_metric_info info;
  memset(&info, 0xff, sizeof info);
  for (int i = 0; i < 1000; i++) {
    fshm_metric_record(s, both[0], 1000, 1, 1, 0, 0);
    fshm_metric_record(s, both[1], 1000000, 1, 0, 0, 0);
  }
  fshm_metric_sum(s, both, 4, &info);
  CHECK_EQ(info.calls, 2000);
  CHECK_EQ(info.errors, 1000);
  CHECK_EQ(info.sum_ns, 1001000000);
  CHECK_EQ(info.least_ns, 1000);
  CHECK_EQ(info.most_ns, 1000000);
  check_near(info.p50_ns, 1000);
  check_near(info.p95_ns, 1000000);
  fshm_metric_sum(s, both, 0, &info);
  CHECK_EQ(info.calls, 0);
  CHECK(info.p50_ns <= 0 && info.least_ns == 0);
}

static void test_weight(fshm_segment *s) {
  uint32_t m = (uint32_t)open_metric(s, "weight", "");
  fshm_metric_info info;
  fshm_metric_record(s, m, 500, 100, 0, 3, 0);
  CHECK_EQ(fshm_metric_at(s, m, &info), FSHM_OK);
  CHECK_EQ(info.calls, 100);
  CHECK_EQ(info.errors, 100);
  CHECK_EQ(info.sum_ns, 50000);
  CHECK_EQ(info.size_in, 300);
  CHECK_EQ(info.component_length, 6);
  CHECK_EQ(info.name_length, 7);
}

/* Several processes open the same names at once, and record at once. */
static void record_many(int i, void *with) {
  fshm_segment *s;
  fshm_error e;
  CHECK_EQ(fshm_open(shared_name, 0, 0600, 0, &s, &e), FSHM_OK);
  meet(with, PARTIES, 1);
  for (int n = 0; n < TOGETHER; n++) {
    int m = open_metric(s, "many", n % 2 ? "odd" : "even");
    fshm_metric_record(s, (uint32_t)m, (uint64_t)(100 + i), 1, n % 4 != 0, 2, 0);
  }
  fshm_close(s);
}

static void test_processes(fshm_segment *s) {
  run_children(PARTIES, record_many, shared_memory(sizeof(_Atomic uint64_t)));
  const char *const names[] = {"even", "odd"};
  for (int i = 0; i < 2; i++) {
    fshm_metric_info info;
    uint32_t m = (uint32_t)open_metric(s, "many", names[i]);
    CHECK_EQ(fshm_metric_at(s, m, &info), FSHM_OK);
    CHECK_EQ(info.calls, PARTIES * TOGETHER / 2);
    CHECK_EQ(info.errors, i ? 0 : PARTIES * TOGETHER / 4);
    CHECK_EQ(info.sum_ns, (PARTIES * 100 + PARTIES * (PARTIES - 1) / 2) * TOGETHER / 2);
    CHECK_EQ(info.size_in, PARTIES * TOGETHER);
    CHECK_EQ(info.least_ns, 100);
    CHECK_EQ(info.most_ns, 100 + PARTIES - 1);
  }
}

static void test_full_table(void) {
  fshm_segment *s = fresh_segment(10);
  fshm_metric_info info;
  char name[300];
  CHECK_EQ(fshm_metric_at(s, 0, &info), 0);
  CHECK_EQ(fshm_metric_at(s, METRICS, &info), FSHM_E_ARGUMENT);
  for (int i = 0; i < METRICS - 1; i++) {
    (void)snprintf(name, sizeof name, "operation %d", i);
    CHECK_EQ(open_metric(s, "c", name), i);
    CHECK_EQ(open_metric(s, "c", name), i);
  }
  CHECK_EQ(open_metric(s, "c", "one more"), METRICS - 1);
  CHECK_EQ(open_metric(s, "d", "and another"), METRICS - 1);
  CHECK_EQ(open_metric(s, "c", "operation 3"), 3);
  fshm_metric_record(s, METRICS - 1, 1000, 1, 1, 0, 0);
  CHECK_EQ(fshm_metric_at(s, METRICS - 1, &info), FSHM_OK);
  CHECK_EQ(memcmp(info.name, "(other)\0(other)", 15), 0);
  CHECK_EQ(info.calls, 1);
  fshm_metric_record(s, METRICS, 1000, 1, 1, 0, 0); /* of no metric: dropped */
  fshm_metric_record(s, UINT32_MAX, 1000, 1, 1, 0, 0);
  fshm_close(s);

  s = fresh_segment(10); /* long names are cut, and the whole names tell them apart */
  memset(name, 'x', sizeof name);
  int first = fshm_metric_open(s, name, 300, name, 300);
  int second = fshm_metric_open(s, name, 299, name, 300);
  CHECK(first != second);
  CHECK_EQ(fshm_metric_open(s, name, 300, name, 300), first);
  CHECK_EQ(fshm_metric_at(s, (uint32_t)first, &info), FSHM_OK);
  CHECK_OP(info.name_length, <=, METRIC_NAME);
  CHECK_EQ(info.name[info.component_length], 0);
  CHECK_OP(fshm_metric_open(s, "", 0, "", 0), >=, 0); /* no names at all are names too */
  fshm_close(s);
}

/* Whatever stands in the segment: no crash, no reading outside, no endless loop. */
static void test_hostile(void) {
  fshm_segment *s = fresh_segment(10);
  fshm_metric_info info;
  for (int n = 0; n < 2000; n++) {
    unsigned char *bytes = (unsigned char *)&s->metrics[n % METRICS];
    for (size_t i = 0; i < sizeof(metric_t); i++) bytes[i] = (unsigned char)random_u64();
    bytes = (unsigned char *)&s->histograms[random_below(METRICS * METRIC_SHARDS)];
    for (size_t i = 0; i < sizeof(histogram_t); i++) bytes[i] = (unsigned char)random_u64();
    for (uint32_t i = 0; i <= METRICS; i++) {
      (void)fshm_metric_at(s, i, &info);
      CHECK_OP(info.name_length, <=, METRIC_NAME);
      CHECK(!isnan(info.p50_ns) && !isnan(info.p99_ns));
    }
    int m = open_metric(s, "c", "o");
    CHECK(m >= 0 && m < METRICS);
    fshm_metric_record(s, (uint32_t)m, random_u64(), random_u64(), 0, 1, 1);
  }
  fshm_close(s);
}

int main(void) {
  fshm_segment *s = fresh_segment(10);
  shared_name = segment_names[0];
  test_buckets();
  test_quantiles(s);
  test_sum(s);
  test_weight(s);
  test_processes(s);
  test_full_table();
  test_hostile();
  fshm_close(s);
  return done();
}
