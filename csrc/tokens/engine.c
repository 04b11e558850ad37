/* engine.c - the engine that counts tokens, as a translation unit beside unity.c. What a compiler inlines is limited by
 * how much a unit grows: in one with the engine, a call of a limiter took 5 % more instructions. */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "vocabulary.c"
#include "builder.c"
#include "counting.c"
