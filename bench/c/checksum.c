/* The twin of codecs/checksum.py, and the loop as RFC 1071 prints it, which gcc vectorises. */
#include <stdint.h>
#include <string.h>

static uint64_t fold(uint64_t total)
{
    while (total >> 16)
        total = (total & 0xffff) + (total >> 16);
    return total;
}

static uint64_t sum_words(const uint8_t *data, int64_t length)
{
    uint64_t total = 0, word = 0;
    int64_t at = 0;
    for (; at + 8 <= length; at += 8) {
        memcpy(&word, data + at, 8);
        word = __builtin_bswap64(word);
        total += (word & 0xffffffff) + (word >> 32);
    }
    for (; at + 2 <= length; at += 2)
        total += data[at] << 8 | data[at + 1];
    return at < length ? total + (data[at] << 8) : total;
}

static uint64_t sum_rfc1071(const uint8_t *data, int64_t length)
{
    uint32_t total = 0;
    int64_t at = 0;
    for (; at + 2 <= length; at += 2)
        total += data[at] << 8 | data[at + 1];
    return at < length ? total + (data[at] << 8) : total;
}

#define DRIVE(name)                                                                    \
    void drive_##name(const uint8_t *data, uint16_t *out, int64_t count, int64_t size) \
    {                                                                                  \
        for (int64_t i = 0; i < count; i++)                                            \
            out[i] = fold(sum_##name(data + i * size, size)) ^ 0xffff;                 \
    }
DRIVE(words)
DRIVE(rfc1071)
