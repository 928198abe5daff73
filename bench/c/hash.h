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

static inline u64 fold(u64 a, u64 b)
{
    unsigned __int128 product = (unsigned __int128)a * b;
    return (u64)(product >> 64) ^ (u64)product;
}

static inline u64 hash3(u64 a, u64 b, u64 c, const u64 *key)
{
    return fold(fold(a ^ key[0], b ^ key[1]) ^ key[2], c ^ key[3]);
}
