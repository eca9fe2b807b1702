/* codec_kernels.h - what codec_kernels.c gives for each instruction set. Internal to io/.
 *
 * Units are 1, 2, 4 or 8 bytes wide; n is in units; nothing needs to be aligned. ordered:
 * units are sign-and-magnitude floats, mapped to integers in the order of the floats first.
 * Values stand in byte planes: byte b of value i is planes[b * stride + i]. */
#ifndef PERTA_IO_CODEC_KERNELS_H
#define PERTA_IO_CODEC_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How far past the end pick() and scatter() may write, put() and gather() read. */
#define PERTA_KERNEL_SLACK 64
#define PERTA_GROUPS_MAX 32

/* Which group a unit is in: its exponent, clamped to first .. first + n - 1, less first. */
struct perta_grouping {
    unsigned shift, e_bits; /* where the exponent is; 0 bits: there is none */
    uint32_t first, n;
};

struct perta_codec_kernels {
    /* z = zigzag(map(after) - map(before)) as planes, or one plane of min(z, 255) where
     * narrow; returns how many are not zero. */
    uint64_t (*delta)(unsigned width, bool ordered, bool narrow, const void *before,
                      const void *after, uint8_t *planes, size_t stride, size_t n);
    /* to (n) = unmap(map(from) +- unzigzag(z)). */
    void (*add)(unsigned width, bool ordered, bool narrow, const void *from,
                const uint8_t *planes, size_t stride, bool minus, void *to, size_t n);
    /* The group of each unit. */
    void (*keys)(unsigned width, const struct perta_grouping *grouping, const void *units,
                 uint8_t *keys, size_t n);
    /* Where keys differ from other, crosses. */
    void (*cross)(uint8_t *keys, const uint8_t *other, uint8_t crosses, size_t n);
    /* counts (n_keys) += how often each key below n_keys occurs. n small, for a cache. */
    void (*count)(const uint8_t *keys, size_t n, unsigned n_keys, uint32_t *counts);
    /* How often value occurs. */
    size_t (*occurs)(const uint8_t *x, uint8_t value, size_t n);
    /* x[i] goes to the end of to[keys[i]], which moves on; gather is the way back. Keys are
     * below n_keys. */
    void (*scatter)(const uint8_t *x, const uint8_t *keys, size_t n, unsigned n_keys,
                    uint8_t **to);
    void (*gather)(uint8_t *x, const uint8_t *keys, size_t n, unsigned n_keys,
                   const uint8_t **from);
    /* x[i] where keys[i] == key, one after another, and back; other x stay. Returns how
     * many. x and keys may be the same. */
    size_t (*pick)(const uint8_t *x, const uint8_t *keys, uint8_t key, size_t n,
                   uint8_t *to);
    void (*put)(uint8_t *x, const uint8_t *keys, uint8_t key, size_t n,
                const uint8_t *from);
    /* fields[i] = min(value i of so many planes, most), below 256. */
    void (*clamp)(const uint8_t *planes, size_t stride, unsigned n_planes, uint8_t most,
                  uint8_t *fields, size_t n);
    /* Fields of bits bits (1, 2 or 4), m = ceil(n * bits / 8) bytes: the first m stand
     * lowest in their bytes, the next m above them, and so on. x (n) is below 1 << bits. */
    void (*pack)(unsigned bits, const uint8_t *x, size_t n, uint8_t *to);
    void (*unpack)(unsigned bits, const uint8_t *packed, size_t n, uint8_t *x);
    /* Bit i of masks says x[i] == value; ceil(n / 64) words. */
    void (*masks)(const uint8_t *x, uint8_t value, size_t n, uint64_t *masks);
};

extern const struct perta_codec_kernels perta_codec_kernels_v2, perta_codec_kernels_v3,
    perta_codec_kernels_v4, perta_codec_kernels_vbmi2;

#endif
