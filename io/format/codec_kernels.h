/* codec_kernels.h - the functions that codec_kernels.c defines for each instruction set. Internal
 * to io/format.
 *
 * Units are 1, 2, 4 or 8 bytes wide; n counts units; nothing needs to be aligned. ordered: units
 * are sign-and-magnitude floats, which are first mapped to integers in the order of the floats. */
#ifndef PERTA_IO_FORMAT_CODEC_KERNELS_H
#define PERTA_IO_FORMAT_CODEC_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How far past the end pick(), scatter() and find() may write, and put() and gather() may read. */
#define PERTA_KERNEL_SLACK 64
#define PERTA_GROUPS_MAX 32

/* How units are grouped: the group is the exponent, clamped to first .. first + n - 1, minus
 * first. */
struct perta_grouping {
    unsigned shift, e_bits; /* where the exponent is; e_bits 0: there is none */
    uint32_t first, n;
};

struct perta_codec_kernels {
    /* z (n) = zigzag(map(after) - map(before)). Returns how many z are not zero. */
    uint64_t (*zigzags)(unsigned width, bool ordered, const void *before, const void *after,
                        void *z, size_t n);
    /* to (n) = unmap(map(from) +- unzigzag(z)). */
    void (*add)(unsigned width, bool ordered, const void *from, const void *z, bool minus, void *to,
                size_t n);
    /* Split z: its low bits go to lows, 8 of them (or what is left) per byte, those of unit i at
     * lows[..][i]. values (n) = min(z >> low, 255), or 0 if low covers all bits. lows may be
     * NULL. */
    void (*split)(unsigned width, unsigned low, const void *z, size_t n, uint8_t *const *lows,
                  uint8_t *values);
    /* The inverse of split, except for values of 255. Returns how many z are not zero. */
    uint64_t (*join)(unsigned width, unsigned low, const uint8_t *values,
                     const uint8_t *const *lows, void *z, size_t n);
    /* keys (n): the group of each unit. */
    void (*keys)(unsigned width, const struct perta_grouping *grouping, const void *units,
                 uint8_t *keys, size_t n);
    /* Where keys differ from other, set them to crosses. */
    void (*cross)(uint8_t *keys, const uint8_t *other, uint8_t crosses, size_t n);
    /* counts (n_keys) += how often each key below n_keys occurs. n is small, for the cache. */
    void (*count)(const uint8_t *keys, size_t n, unsigned n_keys, uint32_t *counts);
    /* How many x are not less than least. */
    size_t (*at_least)(const uint8_t *x, uint8_t least, size_t n);
    /* scatter: append x[i] to to[keys[i]], which advances. gather is the inverse. Keys are below
     * n_keys. */
    void (*scatter)(const uint8_t *x, const uint8_t *keys, size_t n, unsigned n_keys, uint8_t **to);
    void (*gather)(uint8_t *x, const uint8_t *keys, size_t n, unsigned n_keys,
                   const uint8_t **from);
    /* pick: copy the x that are not less than least, contiguously; returns how many. put is the
     * inverse; other x stay. */
    size_t (*pick)(const uint8_t *x, uint8_t least, size_t n, uint8_t *to);
    void (*put)(uint8_t *x, uint8_t least, size_t n, const uint8_t *from);
    /* pack: store each x, or all ones if that is less, as a field of bits bits (1, 2 or 4) in m =
     * ceil(n * bits / 8) bytes. The first m fields are the lowest in their bytes, the next m are
     * above them, and so on. unpack is the inverse. */
    void (*pack)(unsigned bits, const uint8_t *x, size_t n, uint8_t *to);
    void (*unpack)(unsigned bits, const uint8_t *packed, size_t n, uint8_t *x);
    /* Store all i with x[i] == value in at, in order; returns how many. n is below 65536. */
    size_t (*find)(const uint8_t *x, uint8_t value, size_t n, uint16_t *at);
};

extern const struct perta_codec_kernels perta_codec_kernels_v2, perta_codec_kernels_v3,
    perta_codec_kernels_v4, perta_codec_kernels_vbmi2;

#endif
