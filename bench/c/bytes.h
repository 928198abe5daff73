/* The twin of the words in dataplane/jit.py and of codecs/. */
#pragma once
#include <string.h>
#include "hash.h"

static inline u64 load16(const u8 *at) { u16 word; memcpy(&word, at, 2); return __builtin_bswap16(word); }
static inline u64 load32(const u8 *at) { u32 word; memcpy(&word, at, 4); return __builtin_bswap32(word); }
static inline u64 load64(const u8 *at) { u64 word; memcpy(&word, at, 8); return __builtin_bswap64(word); }
static inline u64 load48(const u8 *at) { return load16(at) << 32 | load32(at + 2); }
static inline void store16(u8 *at, u64 value) { u16 word = __builtin_bswap16(value); memcpy(at, &word, 2); }
static inline void store32(u8 *at, u64 value) { u32 word = __builtin_bswap32(value); memcpy(at, &word, 4); }
static inline void store48(u8 *at, u64 value) { store16(at, value >> 32); store32(at + 2, value); }

static inline u64 sum16(const u8 *at, i64 length, u64 total)
{
    for (i64 i = 0; i < length >> 3; i++) {
        u64 word = load64(at + 8 * i);
        total += (word & 0xffffffff) + (word >> 32);
    }
    at += length & ~7;
    if (length & 4) {
        total += load32(at);
        at += 4;
    }
    if (length & 2) {
        total += load16(at);
        at += 2;
    }
    return length & 1 ? total + (*at << 8) : total;
}

static inline u64 fold16(u64 total)
{
    total = (total & 0xffffffff) + (total >> 32);
    total = (total & 0xffff) + (total >> 16);
    total = (total & 0xffff) + (total >> 16);
    return (total & 0xffff) + (total >> 16);
}

static inline u64 update16(u64 sum, u64 old, u64 new)
{
    return fold16((~sum & 0xffff) + (~old & 0xffff) + (new & 0xffff)) ^ 0xffff;
}

static inline int ipv4_valid(const u8 *data, i64 at, i64 end)
{
    if (at + 20 > end || data[at] < 0x45 || data[at] > 0x4f)
        return 0;
    i64 total = load16(data + at + 2);
    return (data[at] & 15) << 2 <= total && at + total <= end;
}

static inline void ethernet_emit(u8 *at, u64 destination, u64 source, u64 ethertype)
{
    store48(at, destination);
    store48(at + 6, source);
    store16(at + 12, ethertype);
}
