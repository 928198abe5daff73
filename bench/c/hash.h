/* The twin of tables/hash.py. */
#pragma once
#include <stdint.h>
#include <stdlib.h>

typedef uint64_t u64;
typedef uint32_t u32;
typedef uint16_t u16;
typedef uint8_t u8;
typedef int64_t i64;
typedef int32_t i32;

static inline u64 nh(u64 word, u64 secret)
{
    return (u64)((u32)word + (u32)secret) * (u32)((word >> 32) + (secret >> 32));
}

static inline u64 hash3(u64 a, u64 b, u64 c, const u64 *key)
{
    u64 total = nh(a, key[0]) + nh(b, key[1]) + nh(c, key[2]);
    total ^= total >> 32;
    total *= key[5];
    total ^= total >> 29;
    total *= key[5];
    return total ^ total >> 32;
}
