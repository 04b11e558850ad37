/* The calendar, the time of day of a segment, and zones. tests/limiters/test_calendar.py holds more against zoneinfo. */
#include "../../csrc/unity.c"

#include "check.h"

static uint64_t day_minute(int64_t year, int64_t month, int64_t day) {
  return (uint64_t)(days_of(year, month) + day - 1) * 1440;
}

static void test_days(void) {
  int64_t year, month, days = days_of(1600, 1);
  CHECK(days_of(1970, 1) == 0 && days_of(2000, 3) == 11017 && days_of(2028, 3) == 21244);
  for (int64_t y = 1600; y < 2500; y++)
    for (int64_t m = 1; m <= 12; m++) {
      const bool leap = y % 4 == 0 && (y % 100 || y % 400 == 0);
      const int64_t length = m == 2 ? 28 + leap : m == 4 || m == 6 || m == 9 || m == 11 ? 30 : 31;
      CHECK(days_of(y, m) == days);
      for (int64_t d = 0; d < length; d++) {
        month_of(days + d, &year, &month);
        CHECK(year == y && month == m);
      }
      days += length;
    }
}

static void test_utc(void) {
  const uint64_t noon = day_minute(2028, 2, 29) + 720;
  CHECK(calendar_end(HOUR_NS, NULL, noon + 59) == noon + 60);
  CHECK(calendar_end(HOUR_NS, NULL, noon) == noon + 60);
  CHECK(calendar_end(DAY_NS, NULL, noon) == day_minute(2028, 3, 1));
  CHECK(calendar_end(WEEK_NS, NULL, noon) == day_minute(2028, 3, 6));
  CHECK(calendar_end(WEEK_NS, NULL, day_minute(2028, 3, 6)) == day_minute(2028, 3, 13));
  CHECK(calendar_end(MONTH_NS, NULL, noon) == day_minute(2028, 3, 1));
  CHECK(calendar_end(MONTH_NS, NULL, day_minute(2028, 12, 31)) == day_minute(2029, 1, 1));
  CHECK(calendar_end(YEAR_NS, NULL, noon) == day_minute(2029, 1, 1));
  CHECK(calendar_end(WEEK_NS, NULL, 0) == day_minute(1970, 1, 5));
}

/* Whatever a segment holds: an end that is later, and not too much. */
static void test_any_zone(void) {
  const uint64_t periods[] = {HOUR_NS, DAY_NS, WEEK_NS, MONTH_NS, YEAR_NS, 0, UINT64_MAX};
  zone_t zone;
  memset(&zone, 0, sizeof zone);
  for (int round = 0; round < fewer(200000); round++) {
    image_random(&zone, sizeof zone);
    uint64_t at[2];
    image_random(at, sizeof at);
    store_relaxed(&zone.count, at[1] % 130);
    if (round & 1) /* near to what there may be */
      for (uint64_t i = 0; i < ZONE_SPANS; i++)
        store_relaxed(&zone.spans[i],
                      ZONE_SPAN(30000000 + i * 1000, (int64_t)(zone.spans[i] % 4000) - 2000));
    const uint64_t minute = round & 2 ? at[0] & ((1U << 28) - 1) : 30000000 + at[0] % 200000;
    const uint64_t end = calendar_end(periods[round % 7], &zone, minute);
    CHECK(end > minute && end <= minute + CALENDAR_MOST);
  }
}

static void test_states(void) {
  rule_t r = rule_make(&(fshm_limit){10, DAY_NS, 0, FSHM_CALENDAR, 0});
  const uint64_t begin = day_minute(2028, 2, 29), end = begin + 1440;
  CHECK(rule_genuine(&r));
  r.base = begin * MINUTE;
  r.floor = 0;
  r.zone = NULL;
  const rule_t bare = rule_bare(&r);
  CHECK(rule_genuine(&bare));
  verdict_t v = rule_take(&r, 0, 1, 1, 4);
  CHECK(!v.retry && v.used_after == 4 && v.reset == DAY_NS - 1 && state_possible(v.next));
  CHECK(IS_CALENDAR(v.next) && CALENDAR_END(v.next) == end && rule_ends(&r, v.next) == DAY_NS);
  CHECK(rule_take(&r, v.next, 2, 2, 7).retry == DAY_NS - 2);
  CHECK(rule_take(&r, v.next, 2, 2, 11).retry == UINT64_MAX);
  CHECK(rule_take(&r, v.next, DAY_NS - 1, DAY_NS - 1, 7).retry == 1);
  CHECK(!rule_take(&r, v.next, DAY_NS, DAY_NS, 10).retry);
  const fshm_charged put = charged_by(&r, v.next, 1, 1);
  CHECK(rule_used(&r, rule_refund(&r, v.next, 2, 3, &put), 2) == 1);
  const uint64_t tomorrow = rule_charge(&r, v.next, DAY_NS, 25);
  CHECK(rule_used(&r, tomorrow, DAY_NS) == 25 && CALENDAR_END(tomorrow) == end + 1440);
  CHECK(rule_refund(&r, tomorrow, DAY_NS, 3, &put) == tomorrow);
  /* the most that it counts */
  const uint64_t full = rule_charge(&r, rule_charge(&r, 0, 1, UINT64_MAX), 1, UINT64_MAX);
  CHECK(rule_used(&r, full, 1) == CALENDAR_COUNT && CALENDAR_END(full) == end);
  /* set back: what is of a later day is of the present one */
  rule_t back = r;
  back.base -= DAY_NS / 2;
  CHECK(rule_take(&back, tomorrow, 1, 1, 1).retry == DAY_NS * 5 / 2 - 1);
  /* never read as another kind's, nor others as its */
  rule_t bucket = rule_make(&(fshm_limit){10, DAY_NS, 10, FSHM_BUCKET, 0});
  CHECK(!state_for(&bucket, v.next) && !state_for(&r, DAY_NS) && !state_for(&r, PENDING(7)));
  CHECK(rule_used(&bucket, rule_convert(&bucket, &r, v.next, 1), 1) == 4);
  CHECK(rule_used(&r, rule_convert(&r, &bucket, bucket_charge(&bucket, 0, 1, 4), 1), 1) == 4);
  rule_t window = rule_make(&(fshm_limit){10, 1000, 0, FSHM_WINDOW, 0});
  const uint64_t as_window = rule_convert(&window, &r, v.next, 1);
  CHECK(rule_used(&window, as_window, DAY_NS - 1) == 4 && state_expires(as_window) - DAY_NS < 100);
  const uint64_t as_day = rule_convert(&r, &window, window_charge(&window, 0, 1, 4), 1);
  CHECK(rule_used(&r, as_day, 1) == 4 && CALENDAR_END(as_day) == begin + 1);
}

static void test_wall(void) {
  fshm_segment *s = fresh_segment(100);
  header_t *h = s->header;
  const uint64_t day = DAY_NS, t = 1000 * MINUTE;
  store_relaxed(&h->wall_base, 30 * day);
  store_relaxed(&h->wall_floor, 30 * day);
#define WALL(now) max_u64((now) + load_relaxed(&h->wall_base), load_relaxed(&h->wall_floor))
  wall_follow(s, 30 * day + t, t); /* as it was */
  CHECK(WALL(t) == 30 * day + t && WALL(t + 5) == 30 * day + t + 5);
  wall_follow(s, 31 * day + t, t); /* a step forward */
  CHECK(WALL(t) == 31 * day + t);
  wall_follow(s, 31 * day + t - HOUR_NS, t + 1); /* back: it stands still */
  CHECK(WALL(t + 1) >= 31 * day + t && WALL(t + 1) <= 31 * day + t + 2 * WALL_CHECK);
  CHECK(WALL(t + HOUR_NS / 2) == WALL(t + 1));
  CHECK(WALL(t + 2 * HOUR_NS) == 31 * day + t + HOUR_NS - 1);
  wall_follow(s, 31 * day + t - HOUR_NS, t + 2); /* again: nothing more */
  CHECK(WALL(t + 2 * HOUR_NS) == 31 * day + t + HOUR_NS - 1);
  wall_follow(s, 31 * day + t - 23 * HOUR_NS, t + 2);
  CHECK(WALL(t + 2) >= 31 * day + t && WALL(t + 2) <= 31 * day + t + 4 * WALL_CHECK);
  wall_follow(s, 29 * day, t + 3); /* it had been wrong */
  CHECK(WALL(t + 3) == 29 * day && WALL(t + 4) == 29 * day + 1);
  /* killed between the two words: the time is as it was, and the next look does the rest */
  store_relaxed(&h->wall_floor, 29 * day + t);
  wall_follow(s, 29 * day - HOUR_NS, t + 3);
  CHECK(WALL(t + 3) >= 29 * day + t);
  fshm_close(s);
}

/* Killed while a zone was written: an id with part of its contents. The next process completes it. */
static void test_zones(void) {
  fshm_segment *s = fresh_segment(100);
  const uint64_t spans[] = {ZONE_SPAN(0, 60), ZONE_SPAN(30000000, 120)},
                 other[] = {ZONE_SPAN(0, 60)};
  char name[ZONE_NAME + 1];
  CHECK_EQ(fshm_zone(s, "Europe/Berlin", 13, spans, 2), 1);
  const uint64_t id = load_relaxed(&s->zones[1].id);
  CHECK_EQ(fshm_zone(s, "Europe/Berlin", 13, other, 1), 2);
  CHECK_EQ(fshm_zone(s, "Europe/Paris", 12, spans, 2), 3);
  memset(&s->zones[1], 0, sizeof *s->zones);
  store_relaxed(&s->zones[1].id, id);
  CHECK_EQ(fshm_zone(s, "Europe/Berlin", 13, spans, 2), 1);
  CHECK_EQ(load_relaxed(&s->zones[1].count), 2);
  CHECK_EQ(fshm_zone_name(s, 1, name, sizeof name), FSHM_OK);
  CHECK(!strcmp(name, "Europe/Berlin"));
  CHECK_EQ(fshm_zone_name(s, 0, name, sizeof name), 0);
  CHECK_EQ(fshm_zone_name(s, 4, name, sizeof name), 0);
  CHECK_EQ(fshm_zone_name(s, ZONES, name, sizeof name), 0);
  CHECK_EQ(fshm_zone(s, name, 0, spans, 2), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_zone(s, name, ZONE_NAME + 1, spans, 2), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_zone(s, "x", 1, spans, 0), FSHM_E_ARGUMENT);
  CHECK_EQ(fshm_zone(s, "x", 1, spans, ZONE_SPANS + 1), FSHM_E_ARGUMENT);
  fshm_close(s);
}

int main(void) {
  test_days();
  test_utc();
  test_any_zone();
  test_states();
  test_wall();
  test_zones();
  return done();
}
