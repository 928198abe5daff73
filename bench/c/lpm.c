/* The twin of tables/lpm.py, and DIR-24-8 as in DPDK's rte_lpm: 2^24 entries of 4 bytes, then groups of 256. */
#include "hash.h"

#define POSITION 0x7fffffff

struct prefix { u64 hi, lo; i32 value, chunk; u16 length, spare[3]; };
struct length { u64 mask_hi, mask_lo; i64 length; };

_Static_assert(sizeof(struct prefix) == 32, "half a cache line");

static inline i64 lookup4(const i32 *nodes, u64 lo)
{
    i64 entry = nodes[nodes[(lo >> 16) & 0xffff] + ((lo >> 8) & 0xff)];
    if (entry < 0)
        entry = nodes[(entry & POSITION) + (lo & 0xff)];
    return entry - 1;
}

static inline i64 home(i64 mask, const struct length *length, const u64 *key, u64 masked_hi, u64 masked_lo)
{
    return hash3(masked_hi, masked_lo, length->length, key) & POSITION & mask;
}

static i64 lookup6(const struct prefix *table, i64 mask, const struct length *lengths, const u64 *key, u64 hi, u64 lo)
{
    u64 masked_hi = hi & lengths[0].mask_hi, masked_lo = lo & lengths[0].mask_lo;
    i64 at = home(mask, &lengths[0], key, masked_hi, masked_lo);
    for (i64 i = 0; lengths[i].length >= 0; i++) {
        u64 next_hi = hi & lengths[i + 1].mask_hi, next_lo = lo & lengths[i + 1].mask_lo;
        i64 next_at = home(mask, &lengths[i + 1], key, next_hi, next_lo);
        __builtin_prefetch(&table[next_at]);
        for (; table[at].length; at = (at + 1) & mask)
            if (table[at].lo == masked_lo && table[at].hi == masked_hi && table[at].length == lengths[i].length + 1)
                return table[at].value;
        masked_hi = next_hi, masked_lo = next_lo, at = next_at;
    }
    return -1;
}

static inline i64 lookup(const i32 *nodes, const struct prefix *table, i64 mask, const struct length *lengths,
                         const u64 *key, u64 hi, u64 lo)
{
    return hi == 0 && lo >> 32 == 0xffff ? lookup4(nodes, lo) : lookup6(table, mask, lengths, key, hi, lo);
}

/* What the drivers below do with a batch of 1. */
static void one_by_one(const i32 *nodes, const struct prefix *table, i64 mask, const struct length *lengths, const u64 *key,
                const u64 *highs, const u64 *lows, i32 *out, i64 total)
{
    for (i64 i = 0; i < total; i++)
        out[i] = lookup(nodes, table, mask, lengths, key, highs[i], lows[i]);
}

static void many(const i32 *nodes, const struct prefix *table, i64 mask, const struct length *lengths, const u64 *key,
                 const u64 *highs, const u64 *lows, i32 *out, i64 count)
{
    i64 others = 0;
    for (i64 i = 0; i < count; i++) {
        if (highs[i] || lows[i] >> 32 != 0xffff) {
            out[i] = 0;
            others++;
            continue;
        }
        out[i] = nodes[(lows[i] >> 16) & 0xffff];
        __builtin_prefetch(&nodes[out[i] + ((lows[i] >> 8) & 0xff)]);
    }
    for (i64 i = 0; i < count; i++) {
        i64 entry = nodes[out[i] + ((lows[i] >> 8) & 0xff)];
        if (entry < 0)
            __builtin_prefetch(&nodes[(entry & POSITION) + (lows[i] & 0xff)]);
        out[i] = entry;
    }
    for (i64 i = 0; i < count; i++) {
        i64 entry = out[i];
        if (entry < 0)
            entry = nodes[(entry & POSITION) + (lows[i] & 0xff)];
        out[i] = entry - 1;
    }
    if (others == 0)
        return;
    for (i64 i = 0; i < count; i++)
        if (highs[i] || lows[i] >> 32 != 0xffff)
            out[i] = lookup6(table, mask, lengths, key, highs[i], lows[i]);
}

void drive(const i32 *nodes, const struct prefix *table, i64 mask, const struct length *lengths, const u64 *key,
                const u64 *highs, const u64 *lows, i32 *out, i64 total, i64 batch)
{
    if (batch == 1)
        return one_by_one(nodes, table, mask, lengths, key, highs, lows, out, total);
    for (i64 i = 0; i < total; i += batch)
        many(nodes, table, mask, lengths, key, highs + i, lows + i, out + i, batch);
}

/* --- DIR-24-8 --- */

#define EXTENDED 0x80000000u

struct dir248 { u32 *first; u32 *groups; u32 used; };

/* Prefixes come shortest first, so none is painted over by a shorter one. Entries are value + 1. */
struct dir248 *dir248_make(const u32 *addresses, const i32 *lengths, const i32 *values, i64 count, i64 groups)
{
    struct dir248 *table = malloc(sizeof *table);
    table->first = calloc(1 << 24, 4);
    table->groups = calloc(groups * 256, 4);
    table->used = 0;
    for (i64 i = 0; i < count; i++) {
        u32 address = addresses[i], entry = values[i] + 1, home = address >> 8;
        if (lengths[i] <= 24) {
            for (u32 j = 0; j < 1u << (24 - lengths[i]); j++)
                table->first[home + j] = entry;
            continue;
        }
        if (!(table->first[home] & EXTENDED)) {
            for (u32 j = 0; j < 256; j++)
                table->groups[table->used * 256 + j] = table->first[home];
            table->first[home] = EXTENDED | table->used++;
        }
        u32 base = (table->first[home] & ~EXTENDED) * 256 + (address & 0xff);
        for (u32 j = 0; j < 1u << (32 - lengths[i]); j++)
            table->groups[base + j] = entry;
    }
    return table;
}

void dir248_free(struct dir248 *table)
{
    free(table->first);
    free(table->groups);
    free(table);
}

/* Both families come as 128 bits here too; DIR-24-8 knows one of them. */
void dir248_drive(const struct dir248 *table, const u64 *highs, const u64 *lows, i32 *out, i64 total)
{
    const u32 *first = table->first, *groups = table->groups;
    for (i64 i = 0; i < total; i++) {
        if (highs[i] || lows[i] >> 32 != 0xffff) {
            out[i] = -1;
            continue;
        }
        u32 entry = first[(lows[i] >> 8) & 0xffffff];
        if (entry & EXTENDED)
            entry = groups[(entry & ~EXTENDED) * 256 + (lows[i] & 0xff)];
        out[i] = (i32)entry - 1;
    }
}

/* As in a table of IPv4 alone: no look at the family. */
void dir248_drive4(const struct dir248 *table, const u64 *lows, i32 *out, i64 total)
{
    const u32 *first = table->first, *groups = table->groups;
    for (i64 i = 0; i < total; i++) {
        u32 entry = first[(lows[i] >> 8) & 0xffffff];
        if (entry & EXTENDED)
            entry = groups[(entry & ~EXTENDED) * 256 + (lows[i] & 0xff)];
        out[i] = (i32)entry - 1;
    }
}
