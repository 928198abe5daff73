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

static inline u64 finish(u64 word, u64 multiplier)
{
    word ^= word >> 32;
    word *= multiplier;
    word ^= word >> 29;
    word *= multiplier;
    return word ^ word >> 32;
}

static inline u64 hash3(u64 a, u64 b, u64 c, const u64 *key)
{
    return finish(nh(a, key[0]) + nh(b, key[1]) + nh(c, key[2]), key[5]);
}

static inline u64 hash5(u64 a, u64 b, u64 c, u64 d, u64 e, const u64 *key)
{
    return finish(nh(a, key[0]) + nh(b, key[1]) + nh(c, key[2]) + nh(d, key[3]) + nh(e, key[4]), key[5]);
}
