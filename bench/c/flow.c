/* The twin of tables/flow.py and tables/tagged.py, and two tables that are looked up one at a time. */
#include <string.h>
#include <stddef.h>
#include "hash.h"

#define MAX_PROBE 128
#define FREE INT64_MAX
#define AHEAD 64
#define ASSURED 0x0004
#define COUNTED 0x0100
#define NAT 0x0030
#define RESERVE 256

enum { USED, HAND, END, FREED, FIRST_FREED, INSERT = 10, INSERT_FAILED = 11, TOO_LONG = 17 };
enum { MISS = -1, FULL = -2, CLASH = -3 };

struct key { u64 src_hi, src_lo, dst_hi, dst_lo; u16 sport, dport; u8 protocol; };
struct half { struct key key; u64 packets, bytes; u8 rest[72]; };
struct flow {
    struct key key; u64 packets, bytes, spare; u8 window[20];
    u8 state, lb_state; u16 status; i64 expires_ns, lb_expires_ns; u8 last[24];
    u8 other[84]; i32 backend, backend_generation, service, service_generation, template, template_generation;
    i32 route_generation; i64 created_ns; u32 mark;
};

_Static_assert(sizeof(struct half) == 128 && sizeof(struct flow) == 256, "two and four cache lines");
_Static_assert(offsetof(struct flow, status) == 86 && offsetof(struct flow, expires_ns) == 88, "as in FLOW");
_Static_assert(offsetof(struct flow, backend) == 212 && offsetof(struct flow, created_ns) == 240, "as in FLOW");

struct table { i64 *slots; i64 mask; const u64 *key; struct flow *flows; i64 rows; i32 *free; i64 *state; struct half *scratch; };

static inline u64 hash(const struct table *t, const struct key *k)
{
    u64 last = (u64)k->protocol << 32 | (u64)k->sport << 16 | k->dport;
    return hash5(k->src_hi, k->src_lo, k->dst_hi, k->dst_lo, last, t->key);
}

static inline struct half *half_of(const struct table *t, i64 half)
{
    return (struct half *)t->flows + half;
}

static inline int same(const struct key *a, const struct key *b)
{
    return a->src_lo == b->src_lo && a->dst_lo == b->dst_lo && a->src_hi == b->src_hi && a->dst_hi == b->dst_hi
        && a->sport == b->sport && a->dport == b->dport && a->protocol == b->protocol;
}

static inline i64 search(const struct table *t, u64 word, const struct key *wanted)
{
    u32 tag = word;
    i64 at = tag & t->mask;
    for (i64 i = 0; i < MAX_PROBE; i++) {
        i64 slot = t->slots[at];
        if (slot == 0)
            return MISS;
        if ((u32)slot == tag) {
            i64 half = ((slot >> 32) - 1) >> 1;
            if (same(&half_of(t, half)->key, wanted))
                return half;
        }
        at = (at + 1) & t->mask;
    }
    return MISS;
}

static inline i64 first(const struct table *t, u64 word)
{
    u32 tag = word;
    i64 at = tag & t->mask;
    for (i64 i = 0; i < MAX_PROBE; i++) {
        i64 slot = t->slots[at];
        if ((u32)slot == tag || slot == 0)
            return (slot >> 32) - 1;
        at = (at + 1) & t->mask;
    }
    return MISS;
}

/* --- lookup --- */

/* One at a time: the same slots and records, no passes. */
void one_by_one(const struct table *t, const struct key *wanted, i64 *out, i64 total)
{
    for (i64 i = 0; i < total; i++)
        out[i] = search(t, hash(t, &wanted[i]), &wanted[i]);
}

static void many(const struct table *t, const struct key *wanted, u64 *words, i64 *out, i64 count)
{
    for (i64 i = 0; i < count; i++) {
        words[i] = hash(t, &wanted[i]);
        __builtin_prefetch(&t->slots[(u32)words[i] & t->mask]);
    }
    for (i64 i = 0; i < count; i++) {
        out[i] = first(t, words[i]) >> 1;
        __builtin_prefetch(half_of(t, out[i]));
    }
    for (i64 i = 0; i < count; i++)
        if (out[i] >= 0 && !same(&half_of(t, out[i])->key, &wanted[i]))
            out[i] = search(t, words[i], &wanted[i]);
}

void drive(const struct table *t, const struct key *wanted, u64 *words, i64 *out, i64 total, i64 batch)
{
    if (batch == 1)
        return one_by_one(t, wanted, out, total);
    for (i64 i = 0; i < total; i += batch)
        many(t, wanted + i, words, out + i, batch);
}

/* Open addressing as in a textbook: the halves themselves lie in the table, one miss per lookup; nothing is stored
 * but the key and the number of the half. Half of the slots are in use. */
struct plain { struct key key; i64 value; u64 spare[2]; };

_Static_assert(sizeof(struct plain) == 64, "a cache line");

void plain_fill(struct plain *slots, i64 mask, const struct table *t)
{
    for (i64 half = 0; half < 2 * t->state[END]; half++) {
        const struct key *key = &half_of(t, half)->key;
        i64 at = hash(t, key) & mask;
        while (slots[at].value)
            at = (at + 1) & mask;
        slots[at].key = *key;
        slots[at].value = half + 1;
    }
}

void plain_drive(const struct plain *slots, i64 mask, const struct table *t, const struct key *wanted, i64 *out, i64 total)
{
    for (i64 i = 0; i < total; i++) {
        i64 at = hash(t, &wanted[i]) & mask;
        while (slots[at].value && !same(&slots[at].key, &wanted[i]))
            at = (at + 1) & mask;
        out[i] = slots[at].value - 1;
    }
}

/* --- insert, delete, expire --- */

static inline i64 place(const struct table *t, u64 word, i64 value)
{
    u32 tag = word;
    i64 at = tag & t->mask;
    for (i64 i = 0; i < MAX_PROBE; i++) {
        if (t->slots[at] == 0) {
            t->slots[at] = (value + 1) << 32 | tag;
            return value;
        }
        at = (at + 1) & t->mask;
    }
    return FULL;
}

static inline i64 take_out(const struct table *t, u64 word, i64 value)
{
    i64 *slots = t->slots, mask = t->mask, entry = (value + 1) << 32 | (u32)word, hole = (u32)word & mask;
    while (slots[hole] != entry) {
        if (slots[hole] == 0)
            return MISS;
        hole = (hole + 1) & mask;
    }
    i64 at = (hole + 1) & mask;
    for (i64 slot = slots[at]; slot != 0; slot = slots[at]) {
        if (((at - slot) & mask) >= ((at - hole) & mask)) {
            slots[hole] = slot;
            hole = at;
        }
        at = (at + 1) & mask;
    }
    slots[hole] = 0;
    return value;
}

static i64 insert(const struct table *t, i64 now)
{
    const struct key *original = &t->scratch[0].key, *reply = &t->scratch[1].key;
    u64 word = hash(t, original), reply_word = hash(t, reply);
    __builtin_prefetch(&t->slots[(u32)reply_word & t->mask]);
    i64 *state = t->state, row = state[FREED] > RESERVE ? t->free[state[FIRST_FREED]] : state[END];
    if (state[USED] >= t->rows - RESERVE)
        row = FULL;
    if (search(t, word, original) >= 0 || search(t, reply_word, reply) >= 0 || same(original, reply)) {
        state[INSERT_FAILED]++;
        return CLASH;
    }
    if (row < 0)
        return FULL;
    if (place(t, word, 4 * row) < 0) {
        state[TOO_LONG]++;
        return FULL;
    }
    if (place(t, reply_word, 4 * row + 2) < 0) {
        take_out(t, word, 4 * row);
        state[TOO_LONG]++;
        return FULL;
    }
    state[USED]++;
    if (state[FREED] > RESERVE) {
        state[FREED]--;
        state[FIRST_FREED] = state[FIRST_FREED] + 1 < t->rows ? state[FIRST_FREED] + 1 : 0;
    } else
        state[END]++;
    memcpy(&t->flows[row], &t->scratch[6], sizeof *t->flows);
    t->flows[row].key = *original;
    half_of(t, 2 * row + 1)->key = *reply;
    t->flows[row].created_ns = now;
    state[INSERT]++;
    return row;
}

static void delete(const struct table *t, i64 row)
{
    struct flow *flow = &t->flows[row];
    struct half *reply = half_of(t, 2 * row + 1);
    u64 word = hash(t, &flow->key), reply_word = hash(t, &reply->key);
    __builtin_prefetch(&t->slots[(u32)reply_word & t->mask]);
    if (take_out(t, word, 4 * row) < 0)
        return;
    take_out(t, reply_word, 4 * row + 2);
    flow->key.protocol = reply->key.protocol = 255;
    flow->expires_ns = FREE;
    flow->status &= NAT;
    i64 at = t->state[FIRST_FREED] + t->state[FREED]++;
    t->free[at < t->rows ? at : at - t->rows] = row;
    t->state[USED]--;
}

void enter(const struct table *t, const struct key *originals, const struct key *replies, i64 *rows, i64 count)
{
    for (i64 i = 0; i < count; i++) {
        t->scratch[0].key = originals[i];
        t->scratch[1].key = replies[i];
        rows[i] = insert(t, 1);
    }
}

void leave(const struct table *t, const i64 *rows, i64 count)
{
    for (i64 i = 0; i < count; i++)
        delete(t, rows[i]);
}

/* The hand goes around once over flows that live. */
i64 sweep(const struct table *t, i64 now)
{
    i64 end = t->state[END], row = t->state[HAND], crowded = 100 * t->state[USED] > 95 * (t->rows - RESERVE);
    for (i64 left = end; left > 0; left--) {
        i64 at = row < end ? row : 0;
        row = at + 1;
        __builtin_prefetch(&t->flows[at + AHEAD].expires_ns);
        const struct flow *flow = &t->flows[at];
        int forgotten = flow->lb_expires_ns <= now && flow->status & COUNTED;
        int disposable = !(flow->status & ASSURED) || (4 <= flow->state && flow->state <= 8);
        if (flow->expires_ns <= now || forgotten || (crowded && flow->expires_ns != FREE && disposable)) {
            t->state[HAND] = row;
            return at;
        }
    }
    t->state[HAND] = row;
    return MISS;
}
