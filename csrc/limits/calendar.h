/* calendar.h - the calendar: when an hour, a day, a week, a month or a year ends in a time zone.
 *
 * Pure: the time is an argument. Instants are minutes since 1970-01-01 00:00 UTC; local times are the same count of a
 * clock on the wall of the zone. A zone is a list of spans: from this minute on, local time is UTC plus so much. The
 * list comes from the tz database (zones.c); index 0 is UTC, which has none.
 *
 * A window begins when the local clock first reaches its begin, and ends when the next one begins. So windows follow
 * one another without a gap, whatever the zone does:
 * - Midnight that is skipped (the clock goes from 24:00 to 01:00): the day begins at 01:00.
 * - Midnight that comes twice (the clock goes from 00:30 back to 23:30): the day begins the first time. The half hour that
 *   the clock then shows again belongs to it.
 * - Hours that come twice, or not at all: each hour that passes is a window; where the clock moves by half an hour,
 *   one window is that much shorter.
 */
#ifndef FSHM_CALENDAR_H
#define FSHM_CALENDAR_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define MINUTE UINT64_C(60000000000)
#define ZONE_SPANS 121
#define ZONE_NAME 40
#define CALENDAR_MOST 576000 /* minutes, 400 days: no window is longer */

/* A zone, in the segment. Entries are claimed in order and never given back. Constant once it is complete. */
typedef struct {
  /* keyed hash of all below; 0 = free. One compare-and-swap (relaxed). */
  _Alignas(64) _Atomic uint64_t id;
  /* The rest is written by any process that has the same zone: always the same bytes. It is complete before a rule that
   * names the zone is published (release). After a crash: part of it; the next process writes it again. */
  _Atomic uint64_t name[ZONE_NAME / 8]; /* padded with zeros */
  _Atomic uint64_t count; /* of spans, 1 at least */
  /* begin (48 bits) | minutes east of UTC + 32768 (16 bits); the first begins at 0 */
  _Atomic uint64_t spans[ZONE_SPANS];
} zone_t;

#define ZONE_SPAN(begin, east) ((uint64_t)(begin) << 16 | (uint64_t)((east) + 32768))

/* The periods that a calendar has. The value is what `per` of such a limit says: the usual length, for people. */
#define HOUR_NS (UINT64_C(60) * MINUTE)
#define DAY_NS (24 * HOUR_NS)
#define WEEK_NS (7 * DAY_NS)
#define MONTH_NS (30 * DAY_NS)
#define YEAR_NS (365 * DAY_NS)

static inline bool calendar_period(uint64_t per) {
  return per == HOUR_NS || per == DAY_NS || per == WEEK_NS || per == MONTH_NS || per == YEAR_NS;
}

static inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

/* Days since 1970-01-01 of the first day of a month (1 .. 12), and back. Gregorian; a year begins in March here, so
 * that the leap day is its last. */
static inline int64_t days_of(int64_t year, int64_t month) {
  year -= month <= 2;
  const int64_t era = floor_div(year, 400), of_era = year - era * 400;
  const int64_t of_year = (153 * (month > 2 ? month - 3 : month + 9) + 2) / 5;
  return era * 146097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719468;
}
static inline void month_of(int64_t days, int64_t *year, int64_t *month) {
  const int64_t shifted = days + 719468, era = floor_div(shifted, 146097);
  const int64_t of_era = shifted - era * 146097;
  const int64_t y = (of_era - of_era / 1460 + of_era / 36524 - of_era / 146096) / 365;
  const int64_t of_year = of_era - (365 * y + y / 4 - y / 100), m = (5 * of_year + 2) / 153;
  *month = m < 10 ? m + 3 : m - 9;
  *year = y + era * 400 + (*month <= 2);
}

/* The local time at which the period after the one of `local` begins. */
static inline int64_t calendar_next(uint64_t per, int64_t local) {
  int64_t year, month, days = floor_div(local, 1440);
  if (per == HOUR_NS) return (floor_div(local, 60) + 1) * 60;
  if (per == DAY_NS) return (days + 1) * 1440;
  if (per == WEEK_NS)
    return ((floor_div(days + 3, 7) + 1) * 7 - 3) * 1440; /* day 0 was a Thursday */
  month_of(days, &year, &month);
  if (per == YEAR_NS) return days_of(year + 1, 1) * 1440;
  return (month == 12 ? days_of(year + 1, 1) : days_of(year, month + 1)) * 1440;
}

/* One span of a zone: [begin, end), minutes east. */
typedef struct {
  int64_t begin, end, east;
} span_t;

static inline uint64_t zone_spans(const zone_t *z) {
  uint64_t count = z ? atomic_load_explicit(&z->count, memory_order_relaxed) : 0;
  return count > ZONE_SPANS ? ZONE_SPANS : count;
}
static inline span_t zone_span(const zone_t *z, uint64_t count, uint64_t i) {
  if (i >= count) return (span_t){0, INT64_MAX, 0};
  const uint64_t word = atomic_load_explicit(&z->spans[i], memory_order_relaxed);
  span_t span = {i ? (int64_t)(word >> 16) : 0, INT64_MAX, (int64_t)(word & 65535) - 32768};
  if (i + 1 < count)
    span.end = (int64_t)(atomic_load_explicit(&z->spans[i + 1], memory_order_relaxed) >> 16);
  return span;
}

/* The minute at which the local clock first reaches `local`. */
static inline int64_t zone_reaches(const zone_t *z, int64_t local) {
  const uint64_t count = zone_spans(z);
  for (uint64_t i = 0;; i++) {
    const span_t span = zone_span(z, count, i);
    int64_t at = local - span.east;
    if (at < span.begin) at = span.begin; /* it was skipped: the first minute after it */
    if (at < span.end || i + 1 >= count) return at;
  }
}

/* When the window of this minute ends: later than it, and at most CALENDAR_MOST later, whatever the zone says. */
static inline uint64_t calendar_end(uint64_t per, const zone_t *z, uint64_t minute) {
  const uint64_t count = zone_spans(z);
  const int64_t now = (int64_t)(minute & ((UINT64_C(1) << 40) - 1));
  uint64_t i = 0;
  while (i + 1 < count && zone_span(z, count, i).end <= now) i++;
  const span_t span = zone_span(z, count, i);
  int64_t next = calendar_next(per, now + span.east), end;
  if (per == HOUR_NS) {
    end = next - span.east;
    if (end >
        span.end) { /* the clock is moved before: the hour that it shows then goes on to its end */
      const int64_t local = span.end + zone_span(z, count, i + 1).east;
      end = span.end + (local % 60 ? 60 - (local % 60 + 60) % 60 : 0);
    }
  } else {
    end = zone_reaches(z, next);
    /* The clock was set back over a begin: that window has begun. */
    for (int k = 0; k < 3 && end <= now; k++)
      end = zone_reaches(z, next = calendar_next(per, next));
  }
  if (end <= now) end = now + 1; /* no tz database says so */
  return (uint64_t)(end - now > CALENDAR_MOST ? now + CALENDAR_MOST : end);
}

#endif
