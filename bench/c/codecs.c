/* The twins of the kernels in bench/codecs.py: the same gates, the same fields, the same bytes written. */
#include <stdint.h>
#include <string.h>

#define SLOT 128
typedef uint8_t u8;
typedef int64_t i64;
typedef uint64_t u64;

#define LOAD(bits)                                               \
    static inline u64 load##bits(const u8 *p)                    \
    {                                                            \
        uint##bits##_t word;                                     \
        memcpy(&word, p, sizeof word);                           \
        return __builtin_bswap##bits(word);                      \
    }                                                            \
    static inline void store##bits(u8 *p, u64 value)             \
    {                                                            \
        uint##bits##_t word = __builtin_bswap##bits((uint##bits##_t)value); \
        memcpy(p, &word, sizeof word);                           \
    }
LOAD(16)
LOAD(32)
LOAD(64)
static inline u64 load48(const u8 *p) { return load16(p) << 32 | load32(p + 2); }
static inline void store48(u8 *p, u64 value) { store16(p, value >> 32); store32(p + 2, value); }

#define PARSE(name, gate, fields)                                \
    void parse_##name(const u8 *data, i64 *out, i64 count)       \
    {                                                            \
        for (i64 i = 0; i < count; i++) {                        \
            const u8 *p = data + i * SLOT;                       \
            out[i] = (gate) ? (i64)(fields) : -1;                \
        }                                                        \
    }
#define EMIT(name, body)                                         \
    void emit_##name(u8 *data, i64 *out, i64 count)              \
    {                                                            \
        for (i64 i = 0; i < count; i++) {                        \
            u8 *p = data + i * SLOT;                             \
            u64 v = (u64)out[i];                                 \
            body                                                 \
        }                                                        \
    }

static inline int tagged(u64 type) { return type == 0x8100 || type == 0x88a8; }
static inline i64 type_at(const u8 *p)
{
    i64 at = 12;
    for (int i = 0; i < 2 && tagged(load16(p + at)); i++)
        at += 4;
    return at;
}

PARSE(ethernet, type_at(p) + 2 <= SLOT, load48(p) ^ load48(p + 6) ^ load16(p + type_at(p)))
PARSE(arp,
      (load16(p) == 1 || load16(p) == 6) && load16(p + 2) == 0x800 && load16(p + 4) == 0x604 &&
          (load16(p + 6) == 1 || load16(p + 6) == 2),
      load16(p + 6) ^ load48(p + 8) ^ load32(p + 14) ^ load48(p + 18) ^ load32(p + 24))
PARSE(ipv4, p[0] >= 0x45 && p[0] <= 0x4f && ((p[0] & 15u) << 2) <= load16(p + 2) && load16(p + 2) <= SLOT,
      load32(p + 12) ^ load32(p + 16) ^ p[9] ^ p[8] ^ load16(p + 2) ^ load16(p + 6))
PARSE(ipv6, p[0] >> 4 == 6 && 40 + load16(p + 4) <= SLOT,
      (load64(p + 8) ^ load64(p + 16) ^ load64(p + 24) ^ load64(p + 32) ^ p[7] ^ load16(p + 4)) & INT64_MAX)
PARSE(udp, load16(p + 4) >= 8 && load16(p + 4) <= SLOT, load16(p) ^ load16(p + 2) ^ load16(p + 4) ^ load16(p + 6))
PARSE(tcp, (p[12] >> 4) >= 5 && p[12] >> 4 << 2 <= SLOT,
      load16(p) ^ load16(p + 2) ^ load32(p + 4) ^ load32(p + 8) ^ p[13] ^ load16(p + 14))
PARSE(vxlan, (load32(p) & 0x8000000) != 0 && (load32(p) & ~0x8000000ull) == 0 && p[7] == 0, load32(p + 4) >> 8)

EMIT(ethernet, { store48(p, v); store48(p + 6, v + 1); store16(p + 12, 0x800); })
EMIT(arp, {
    store16(p, 1); store16(p + 2, 0x800); store16(p + 4, 0x604); store16(p + 6, 2);
    store48(p + 8, v); store32(p + 14, v); store48(p + 18, v + 1); store32(p + 24, v + 1);
})
EMIT(ipv4, {
    store16(p, 0x4500); store16(p + 2, 100); store32(p + 4, 0); store16(p + 8, 64 << 8 | 17); store16(p + 10, 0);
    store32(p + 12, v); store32(p + 16, v + 1);
    u64 total = 0;
    for (int at = 0; at < 20; at += 4)
        total += load32(p + at);
    total = (total & 0xffff) + (total >> 16);
    total = (total & 0xffff) + (total >> 16);
    store16(p + 10, ~((total & 0xffff) + (total >> 16)));
})
EMIT(ipv6, {
    store32(p, 6u << 28); store16(p + 4, 60); p[6] = 17; p[7] = 64;
    store64(p + 8, v); store64(p + 16, v + 1); store64(p + 24, v + 2); store64(p + 32, v + 3);
})
EMIT(udp, { store16(p, v); store16(p + 2, 53); store16(p + 4, 60); store16(p + 6, 0); })
EMIT(tcp, {
    store32(p, v); store32(p + 4, v + 1); store32(p + 8, v + 2); store16(p + 12, 0x5010); store16(p + 14, 0);
    store32(p + 16, 0);
})
EMIT(vxlan, { store32(p, 0x8000000); store32(p + 4, (v & 0xffffff) << 8); })
