/* The twin of tables/index.py, as tables/neighbour.py and tables/vtep.py use it: same layout, same probing. */
#include "hash.h"

#define MAX_PROBE 32

struct slot { u64 hi, lo; i32 scope; u32 row; u64 spare; };

_Static_assert(sizeof(struct slot) == 32, "half a cache line");

static inline i64 find(const struct slot *slots, i64 mask, const u64 *key, i32 scope, u64 hi, u64 lo)
{
    i64 at = (u32)hash3(hi, lo, scope, key) & mask;
    for (i64 distance = 0; distance < MAX_PROBE; distance++) {
        i64 row = (i64)slots[at].row - 1;
        if (slots[at].lo == lo && slots[at].hi == hi && slots[at].scope == scope)
            return row;
        if (row < 0)
            return -1;
        at = (at + 1) & mask;
    }
    return -1;
}

void neighbours(const struct slot *slots, i64 mask, const u64 *key, const i32 *interfaces, const u64 *lows,
                i32 *out, i64 total, i64 batch)
{
    for (i64 start = 0; start < total; start += batch)
        for (i64 i = start; i < start + batch; i++)
            out[i] = find(slots, mask, key, interfaces[i], 0, lows[i]);
}

void vteps(const struct slot *slots, i64 mask, const u64 *key, const u64 *highs, const u64 *lows,
           i32 *out, i64 total, i64 batch)
{
    for (i64 start = 0; start < total; start += batch)
        for (i64 i = start; i < start + batch; i++)
            out[i] = find(slots, mask, key, 0, highs[i], lows[i]);
}
