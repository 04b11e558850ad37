/* test_token_memo.c - the memo of token counts: shared, of a fixed size, and never wrong. */
#include "../../csrc/unity.c"

#include "check.h"

#define LARGEST ((UINT64_C(1) << 24) - 1)

static uint64_t encoding_of(fshm_segment *s, const char *name) {
  return fshm_memo_encoding(s, name, strlen(name));
}

static int64_t known(fshm_segment *s, uint64_t encoding, const char *text) {
  return fshm_memo_get(s, encoding, text, strlen(text));
}

static void keep(fshm_segment *s, uint64_t encoding, const char *text, uint64_t count) {
  fshm_memo_put(s, encoding, text, strlen(text), count);
}

static fshm_memo_info info_of(fshm_segment *s) {
  fshm_memo_info out;
  fshm_memo_at(s, &out);
  return out;
}

static void test_put_and_get(void) {
  fshm_segment *s = fresh_segment(1000);
  uint64_t e = encoding_of(s, "o200k_base"), other = encoding_of(s, "cl100k_base");
  CHECK_OP(e, !=, other);
  CHECK_EQ(e, encoding_of(s, "o200k_base"));
  CHECK_EQ(known(s, e, "hello"), -1);
  keep(s, e, "hello", 3);
  CHECK_EQ(known(s, e, "hello"), 3);
  CHECK_EQ(known(s, other, "hello"), -1);
  keep(s, other, "hello", 4);
  CHECK_EQ(known(s, e, "hello"), 3);
  CHECK_EQ(known(s, other, "hello"), 4);
  CHECK_EQ(known(s, e, "hell"), -1);
  CHECK_EQ(fshm_memo_get(s, e, "hello\0", 6), -1);
  keep(s, e, "", 0);
  CHECK_EQ(known(s, e, ""), 0);
  keep(s, e, "hello", 5); /* the newest counts: a text has one place */
  CHECK_EQ(known(s, e, "hello"), 5);
  CHECK_EQ(info_of(s).texts, 3);
}

/* A count has 24 bits; what does not fit is not kept, and does not become another number. */
static void test_large_counts(void) {
  fshm_segment *s = fresh_segment(1000);
  uint64_t e = encoding_of(s, "e");
  keep(s, e, "most", LARGEST);
  CHECK_EQ(known(s, e, "most"), LARGEST);
  keep(s, e, "more", LARGEST + 1);
  CHECK_EQ(known(s, e, "more"), -1);
  keep(s, e, "all", UINT64_MAX);
  CHECK_EQ(known(s, e, "all"), -1);
  keep(s, e, "most", LARGEST + 7); /* nor does it touch what is there */
  CHECK_EQ(known(s, e, "most"), LARGEST);
}

/* Many more texts than places: it stays as large as it is, and what it still knows is right. */
static void test_fixed_size(void) {
  fshm_segment *s = fresh_segment(1000);
  uint64_t e = encoding_of(s, "e"), entries = info_of(s).entries, kept = 0;
  CHECK_EQ(entries, s->memo_lines * MEMO_WAYS);
  uint64_t texts = entries * 8;
  for (uint64_t i = 0; i < texts; i++) fshm_memo_put(s, e, &i, sizeof i, i * 7 & LARGEST);
  for (uint64_t i = 0; i < texts; i++) {
    int64_t count = fshm_memo_get(s, e, &i, sizeof i);
    if (count >= 0) kept++;
    if (count >= 0) CHECK_EQ(count, i * 7 & LARGEST);
  }
  CHECK_EQ(info_of(s).entries, entries);
  CHECK_EQ(info_of(s).texts, kept);
  CHECK_OP(kept, >, entries * 9 / 10); /* places are used: old texts make room, not new ones */
}

/* Every entry of one text, with any one bit of the 104 changed, is another text's. */
static void test_scribbled_entries(void) {
  fshm_segment *s = fresh_segment(1000);
  uint64_t e = encoding_of(s, "e");
  keep(s, e, "text", 42);
  uint64_t hash[2];
  fshm_memo_hash(s, e, "text", 4, hash);
  memo_line_t p = line_of(s, hash);
  unsigned way = 0;
  while (way < MEMO_WAYS && s->memo[p.line - s->memo + way].who != p.who) way++;
  CHECK_OP(way, <, MEMO_WAYS);
  if (way == MEMO_WAYS) return;
  for (int bit = 0; bit < 64; bit++) {
    p.line[way].who = p.who ^ UINT64_C(1) << bit;
    CHECK_EQ(known(s, e, "text"), -1);
    p.line[way].who = p.who;
  }
  for (int bit = COUNT_BITS; bit < 64; bit++) {
    p.line[way].when = (p.when | 42) ^ UINT64_C(1) << bit;
    CHECK_EQ(known(s, e, "text"), -1);
    p.line[way].when = p.when | 42;
  }
  CHECK_EQ(known(s, e, "text"), 42);
}

/* Any words at all: no crash, no count. And the memo works on. */
static void test_hostile_words(void) {
  fshm_segment *s = fresh_segment(1000);
  uint64_t e = encoding_of(s, "e"), entries = info_of(s).entries;
  for (uint64_t i = 0; i < entries; i++) {
    uint64_t word = random_u64();
    s->memo[i].who = word & 1 ? UINT64_MAX : random_u64();
    s->memo[i].when = word & 2 ? UINT64_MAX : random_u64();
  }
  for (uint64_t i = 0; i < 20000; i++) CHECK_EQ(fshm_memo_get(s, e, &i, sizeof i), -1);
  for (uint64_t i = 0; i < 1000; i++) {
    fshm_memo_put(s, e, &i, sizeof i, i);
    CHECK_EQ(fshm_memo_get(s, e, &i, sizeof i), i);
  }
}

#define PROCS 4
#define SWAPS 60000
#define TEXTS 64

static void hammer(int me, void *with) {
  fshm_segment *s = with;
  uint64_t e = encoding_of(s, "e");
  for (int i = 0; i < SWAPS; i++) {
    /* All in one line of four places, so that entries are swapped all the time. */
    uint64_t text = random_below(TEXTS), entry = random_below(MEMO_WAYS);
    uint64_t data[2] = {text, ~text};
    int64_t count = fshm_memo_get(s, e, data, sizeof data);
    if (count >= 0 && (uint64_t)count != text * 1000 + 1) CHECK_EQ(count, text * 1000 + 1);
    fshm_memo_put(s, e, data, sizeof data, text * 1000 + 1);
    if ((i + me) % 8) continue;
    pair_t seen = pair_load(&s->memo[entry]); /* make room, and have others meet it half empty */
    (void)pair_cas(&s->memo[entry], &seen, (pair_t){0, 0});
  }
}

/* Readers and writers of the same places in four processes: a count is right, or not there. */
static void test_never_torn(void) {
  fshm_segment *s = fresh_segment(1);
  s->memo_lines = 1; /* inherited by the children */
  run_children(PROCS, hammer, s);
}

static void count_in_child(int me, void *with) {
  fshm_segment *s = with;
  uint64_t e = encoding_of(s, "e");
  CHECK_EQ(known(s, e, "of the parent"), 11);
  keep(s, e, me ? "of child 1" : "of child 0", 20 + (uint64_t)me);
}

/* A handle that can only look: it knows what others counted, and keeps nothing. */
static void look_only(int me, void *with) {
  fshm_segment *s = with;
  fshm_error error;
  fshm_close(s); /* else the same mapping would be had again */
  const char *name = segment_names[segments_made - 1];
  CHECK_EQ(fshm_open(name, 0, 0600, FSHM_OPEN_READ_ONLY, &s, &error), FSHM_OK);
  CHECK(s->read_only);
  uint64_t e = encoding_of(s, "e");
  CHECK_EQ(known(s, e, "of child 1"), 21);
  keep(s, e, "never kept", 1); /* no fault, no effect */
  fshm_memo_count(s, 1, 1);
  CHECK_EQ(known(s, e, "never kept"), -1);
  CHECK_EQ(info_of(s).texts, 3);
  CHECK_EQ(info_of(s).hits, 0);
  (void)me;
}

static void test_shared_by_processes(void) {
  fshm_segment *s = fresh_segment(1000);
  uint64_t e = encoding_of(s, "e");
  keep(s, e, "of the parent", 11);
  run_children(2, count_in_child, s);
  CHECK_EQ(known(s, e, "of child 0"), 20);
  CHECK_EQ(known(s, e, "of child 1"), 21);
  run_children(1, look_only, s);
  CHECK_EQ(info_of(s).texts, 3);
}

/* Other segments have other secrets: a text prepared for one place is elsewhere in another. */
static void test_secret(void) {
  fshm_segment *a = fresh_segment(100000), *b = fresh_segment(100000);
  uint64_t e = encoding_of(a, "e"), same = 0;
  CHECK_OP(e, !=, encoding_of(b, "e"));
  for (uint64_t i = 0; i < 1000; i++) {
    uint64_t first[2], second[2];
    fshm_memo_hash(a, e, &i, sizeof i, first);
    fshm_memo_hash(b, e, &i, sizeof i, second);
    memo_line_t p = line_of(a, first), q = line_of(b, second);
    same += p.line - a->memo == q.line - b->memo;
    CHECK_OP(p.who, !=, q.who);
  }
  CHECK_OP(same, <, 50); /* by chance: 1000 / 2500 lines */
}

static void test_names_off(void) {
  fshm_segment *s;
  fshm_error e;
  CHECK_EQ(fshm_open(fresh_name(), 1000, 0600, FSHM_OPEN_CREATE | FSHM_NAMES_OFF, &s, &e), FSHM_OK);
  uint64_t encoding = encoding_of(s, "e");
  keep(s, encoding, "text", 9);
  CHECK_EQ(known(s, encoding, "text"), 9);
}

static void test_sums(void) {
  fshm_segment *s = fresh_segment(1000);
  fshm_memo_count(s, 64, 0);
  fshm_memo_count(s, 3, 64);
  CHECK_EQ(info_of(s).hits, 67);
  CHECK_EQ(info_of(s).misses, 64);
}

/* What is known for one tenant is known for no other, nor for who names none; and not in another segment. */
static void test_tenants(void) {
  fshm_segment *s = fresh_segment(1000), *other = fresh_segment(1000);
  uint64_t e = encoding_of(s, "e"), a = fshm_memo_tenant(s, e, "a", 1);
  const uint64_t others[] = {e, fshm_memo_tenant(s, e, "b", 1), fshm_memo_tenant(s, e, "", 0),
                             fshm_memo_tenant(s, encoding_of(s, "f"), "a", 1)};
  CHECK_EQ(fshm_memo_tenant(s, e, "a", 1), a);
  CHECK_OP(fshm_memo_tenant(other, encoding_of(other, "e"), "a", 1), !=, a);
  keep(s, a, "text", 3);
  CHECK_EQ(known(s, a, "text"), 3);
  for (int i = 0; i < 4; i++) CHECK_EQ(known(s, others[i], "text"), -1);
  for (int i = 0; i < 4; i++) keep(s, others[i], "text", 7);
  CHECK_EQ(known(s, a, "text"), 3);
}

int main(void) {
  test_put_and_get();
  test_tenants();
  test_large_counts();
  test_fixed_size();
  test_scribbled_entries();
  test_hostile_words();
  test_never_torn();
  test_shared_by_processes();
  test_secret();
  test_names_off();
  test_sums();
  return done();
}
