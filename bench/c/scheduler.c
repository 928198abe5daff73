/* The twin of tables/scheduler.py and what it is made of: same records, same algorithms. */
#include "hash.h"

#define USABLE(b) ((b)->weight > 0 && !((b)->flags & 2))
#define M 4093
#define KEY_BUCKET 2654435761u
#define KEY_STEP 2654446892u

enum kind { RR, WRR, LC, WLC, SED, NQ, SH, DH, MH, FO, OVF };

struct backend {
    u64 hi, lo;
    i32 next, weight, active, inactive;
    u16 flags, port;
    i32 last_weight, generation, ring_next, ring_previous, lighter, heavier, service;
    i32 previous, persistent, u_threshold, l_threshold;
    int16_t turns, place, skip, spare;
    u64 counters[5];
};

struct service {
    u64 hi, lo;
    i32 scope;
    u8 scheduler, spare;
    u16 flags;
    i32 head, count, position, cw, mw, di, ring, lightest_in, buckets, generation;
    i64 timeout_ns;
    u64 mask_hi, mask_lo, counters[5];
};

_Static_assert(sizeof(struct backend) == 128 && sizeof(struct service) == 128, "two cache lines");

static i32 round_robin(struct service *s, struct backend *b)
{
    i32 row = s->position;
    for (i32 i = 0; i <= s->count; i++) {
        row = row < 0 ? s->head : b[row].next;
        if (row >= 0 && USABLE(&b[row]))
            return s->position = row;
    }
    return -1;
}

static void shrink(struct service *s, struct backend *b)
{
    i32 last = s->lightest_in;
    while (last >= 0 && b[last].weight < s->cw) {
        i32 before = b[last].ring_previous, after = b[last].ring_next;
        *(before >= 0 ? &b[before].ring_next : &s->ring) = after;
        if (after >= 0)
            b[after].ring_previous = before;
        last = b[last].heavier;
    }
    s->lightest_in = last;
}

static void grow(struct service *s, struct backend *b)
{
    i32 last = s->lightest_in;
    while (last >= 0 && b[last].lighter >= 0 && b[b[last].lighter].weight >= s->cw) {
        last = b[last].lighter;
        i32 before = b[last].ring_previous, after = b[last].ring_next;
        *(before >= 0 ? &b[before].ring_next : &s->ring) = last;
        if (after >= 0)
            b[after].ring_previous = last;
    }
    s->lightest_in = last;
}

static void lower(struct service *s, struct backend *b, i64 limit)
{
    i64 excess = s->cw - limit;
    if (excess > 0)
        s->cw -= (excess + s->di - 1) / s->di * s->di;
    grow(s, b);
}

static i32 weighted(struct service *s, struct backend *b)
{
    i32 start = s->position, at = start, stop = -2;
    i64 limit = (i64)1 << 31;
    int passes = 0, last_pass = 0, restarted = 0;
    if (s->mw == 0)
        return -1;
    for (;;) {
        for (i32 row = at < 0 ? s->ring : b[at].ring_next; row >= 0; row = b[row].ring_next) {
            if (USABLE(&b[row]))
                return s->position = row;
            if (row == stop) {
                s->position = row;
                return -1;
            }
        }
        at = -1;
        s->cw -= s->di;
        if (s->cw <= 0) {
            s->cw = s->mw;
            shrink(s, b);
            if (last_pass || start < 0) {
                s->position = -1;
                return -1;
            }
            restarted = 1;
        }
        if (++passes == 2) {
            limit = 1;
            for (i32 row = s->head; row >= 0; row = b[row].next)
                if (USABLE(&b[row]) && b[row].weight > limit)
                    limit = b[row].weight;
        }
        lower(s, b, limit);
        last_pass = s->cw <= s->di;
        if (last_pass && restarted)
            stop = start;
    }
}

/* The walk over the whole list that the ring saves; for services in which one backend can be used. */
static i32 walk(struct service *s, struct backend *b)
{
    i32 row = s->position;
    for (;;) {
        row = row < 0 ? s->head : b[row].next;
        for (; row >= 0; row = b[row].next)
            if (b[row].weight >= s->cw && !(b[row].flags & 2))
                return s->position = row;
        s->cw -= s->di;
        if (s->cw <= 0)
            s->cw = s->mw;
    }
}

static i32 least(struct service *s, struct backend *b, enum kind kind)
{
    i32 best = -1;
    i64 best_load = 0, best_weight = 0;
    for (i32 row = s->head; row >= 0; row = b[row].next) {
        if (!USABLE(&b[row]))
            continue;
        int counted = kind == LC || kind == WLC;
        i64 load = counted ? ((i64)b[row].active << 8) + b[row].inactive : (i64)b[row].active + 1;
        i64 weight = kind == LC ? 1 : b[row].weight;
        if (kind == NQ && load == 1)
            return row;
        if (best < 0 || best_load * weight > load * best_weight)
            best = row, best_load = load, best_weight = weight;
    }
    return best;
}

static i32 heaviest(struct service *s, struct backend *b, int overflow)
{
    i32 best = -1, most = 0;
    for (i32 row = s->head; row >= 0; row = b[row].next)
        if (USABLE(&b[row]) && b[row].weight > most && !(overflow && b[row].active > b[row].weight))
            best = row, most = b[row].weight;
    return best;
}

static u32 fold(u64 hi, u64 lo)
{
    if (hi == 0 && lo >> 32 == 0xffff)
        return (u32)lo;
    return (u32)((hi ^ lo) ^ (hi ^ lo) >> 32);
}

#define ROTATE(x, n) ((x) << (n) | (x) >> (64 - (n)))
#define ROUND \
    v0 += v1, v1 = ROTATE(v1, 13) ^ v0, v0 = ROTATE(v0, 32), v2 += v3, v3 = ROTATE(v3, 16) ^ v2, \
    v0 += v3, v3 = ROTATE(v3, 21) ^ v0, v2 += v1, v1 = ROTATE(v1, 17) ^ v2, v2 = ROTATE(v2, 32)

static u32 siphash(u32 word, u64 key)
{
    u64 v0 = key ^ 0x736f6d6570736575, v1 = key ^ 0x646f72616e646f6d;
    u64 v2 = key ^ 0x6c7967656e657261, v3 = key ^ 0x7465646279746573;
    u64 message = (u64)4 << 56 | word;
    v3 ^= message;
    ROUND;
    v0 ^= message;
    v2 ^= 0xff;
    ROUND;
    ROUND;
    ROUND;
    return (u32)(v0 ^ v1 ^ v2 ^ v3);
}

static i32 hashed(struct backend *b, const i32 *buckets, u32 word, int fallback)
{
    u32 home = word * 0x61c88647u >> 24;
    i32 row = buckets[home];
    if (row < 0 || USABLE(&b[row]))
        return row;
    for (u32 offset = 0; fallback && offset < 256; offset++) {
        row = buckets[(((offset + home) & 255) + home) & 255];
        if (row < 0 || USABLE(&b[row]))
            return row;
    }
    return -1;
}

static i32 maglev(struct backend *b, const i32 *buckets, u32 word, int fallback)
{
    u32 home = siphash(word, KEY_BUCKET) % M;
    i32 row = buckets[home];
    if (row < 0 || USABLE(&b[row]))
        return row;
    for (u32 offset = 0; fallback && offset < M; offset++) {
        row = buckets[siphash(word + (offset + home) % M, KEY_BUCKET) % M];
        if (row < 0 || USABLE(&b[row]))
            return row;
    }
    return -1;
}

static i32 pick(struct service *s, struct backend *b, const i32 *buckets, u64 hi, u64 lo, u32 sport)
{
    int fallback = s->flags & 8;
    u32 port = s->flags & 16 ? sport : 0;
    switch (s->scheduler) {
    case RR: return round_robin(s, b);
    case WRR: return weighted(s, b);
    case LC: return least(s, b, LC);
    case WLC: return least(s, b, WLC);
    case SED: return least(s, b, SED);
    case NQ: return least(s, b, NQ);
    case SH: return hashed(b, buckets + s->buckets, fold(hi, lo) + port, fallback);
    case DH: return hashed(b, buckets + s->buckets, fold(s->hi, s->lo), 0);
    case MH: return maglev(b, buckets + s->buckets, fold(hi, lo) + port, fallback);
    case FO: return heaviest(s, b, 0);
    default: return heaviest(s, b, 1);
    }
}

void drive(struct service *services, const i32 *rows, struct backend *b, const i32 *buckets, const u64 *lows,
           const i32 *sports, i32 *out, i64 total)
{
    for (i64 i = 0; i < total; i++)
        out[i] = pick(&services[rows[i]], b, buckets, 0, lows[i], sports[i]);
}

void drive_walk(struct service *services, i64 service, struct backend *b, i32 *out, i64 total)
{
    for (i64 i = 0; i < total; i++)
        out[i] = walk(&services[service], b);
}

static i32 gcd(i32 a, i32 b)
{
    while (b) {
        i32 rest = a % b;
        a = b, b = rest;
    }
    return a;
}

void build(struct backend *b, i64 head, i32 *buckets)
{
    i32 divisor = 0, most = 0, shift = 0;
    for (i64 row = head; row >= 0; row = b[row].next) {
        divisor = gcd(b[row].last_weight, divisor);
        most = b[row].last_weight > most ? b[row].last_weight : most;
    }
    for (i32 i = 0; i < M; i++)
        buckets[i] = -1;
    if (!divisor)
        return;
    while (most / divisor >> shift >= 64)
        shift++;
    for (i64 row = head; row >= 0; row = b[row].next) {
        u32 word = fold(b[row].hi, b[row].lo) + b[row].port;
        i32 turns = b[row].last_weight / divisor >> shift;
        b[row].place = siphash(word, KEY_BUCKET) % M;
        b[row].skip = siphash(word, KEY_STEP) % (M - 1) + 1;
        b[row].turns = turns ? turns : b[row].last_weight > 0;
    }
    i64 row = head;
    for (i32 filled = 0; filled < M;) {
        i32 place = b[row].place, skip = b[row].skip;
        for (i32 turn = 0; turn < b[row].turns && filled < M; turn++, filled++) {
            while (buckets[place] >= 0) {
                place += skip;
                if (place >= M)
                    place -= M;
            }
            buckets[place] = (i32)row;
        }
        b[row].place = place;
        row = b[row].next < 0 ? head : b[row].next;
    }
}
