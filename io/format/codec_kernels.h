/* codec_kernels.h - what codec_kernels.c gives for each instruction set. Internal to io/.
 *
 * Units are 1, 2, 4 or 8 bytes wide; n is in units; nothing needs to be aligned. ordered:
 * units are sign-and-magnitude floats, mapped to integers in the order of the floats first.
 */
#ifndef PERTA_IO_FORMAT_CODEC_KERNELS_H
#define PERTA_IO_FORMAT_CODEC_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* How far past the end pick(), scatter() and find() may write, put() and gather() read. */
#define PERTA_KERNEL_SLACK 64
#define PERTA_GROUPS_MAX 32

/* Which group a unit is in: its exponent, clamped to first .. first + n - 1, less first. */
struct perta_grouping {
    unsigned shift, e_bits; /* where the exponent is; 0 bits: there is none */
    uint32_t first, n;
};

struct perta_codec_kernels {
    /* z (n) = zigzag(map(after) - map(before)); returns how many are not zero. */
    uint64_t (*zigzags)(unsigned width, bool ordered, const void *before, const void *after,
                        void *z, size_t n);
    /* to (n) = unmap(map(from) +- unzigzag(z)). */
    void (*add)(unsigned width, bool ordered, const void *from, const void *z, bool minus, void *to,
                size_t n);
    /* The low bits of z, 8 or what is left of them to a byte: those of unit i at
     * lows[..][i]. values (n) = min(z >> low, 255); where all bits are low 0. lows may be
     * NULL. */
    void (*split)(unsigned width, unsigned low, const void *z, size_t n, uint8_t *const *lows,
                  uint8_t *values);
    /* And back, but for values of 255; returns how many z are not zero. */
    uint64_t (*join)(unsigned width, unsigned low, const uint8_t *values,
                     const uint8_t *const *lows, void *z, size_t n);
    /* The group of each unit. */
    void (*keys)(unsigned width, const struct perta_grouping *grouping, const void *units,
                 uint8_t *keys, size_t n);
    /* Where keys differ from other, crosses. */
    void (*cross)(uint8_t *keys, const uint8_t *other, uint8_t crosses, size_t n);
    /* counts (n_keys) += how often each key below n_keys occurs. n small, for a cache. */
    void (*count)(const uint8_t *keys, size_t n, unsigned n_keys, uint32_t *counts);
    /* How many x are not less than least. */
    size_t (*at_least)(const uint8_t *x, uint8_t least, size_t n);
    /* x[i] goes to the end of to[keys[i]], which moves on; gather is the way back. Keys are
     * below n_keys. */
    void (*scatter)(const uint8_t *x, const uint8_t *keys, size_t n, unsigned n_keys, uint8_t **to);
    void (*gather)(uint8_t *x, const uint8_t *keys, size_t n, unsigned n_keys,
                   const uint8_t **from);
    /* Those x that are not less than least, one after another; returns how many. put is the
     * way back; other x stay. */
    size_t (*pick)(const uint8_t *x, uint8_t least, size_t n, uint8_t *to);
    void (*put)(uint8_t *x, uint8_t least, size_t n, const uint8_t *from);
    /* Fields of bits bits (1, 2 or 4), each x or all ones if that is less, into
     * m = ceil(n * bits / 8) bytes: the first m stand lowest in their bytes, the next m
     * above them, and so on. unpack gives the fields. */
    void (*pack)(unsigned bits, const uint8_t *x, size_t n, uint8_t *to);
    void (*unpack)(unsigned bits, const uint8_t *packed, size_t n, uint8_t *x);
    /* Where x[i] == value, in order, into at; returns how many. n below 65536. */
    size_t (*find)(const uint8_t *x, uint8_t value, size_t n, uint16_t *at);
};

extern const struct perta_codec_kernels perta_codec_kernels_v2, perta_codec_kernels_v3,
    perta_codec_kernels_v4, perta_codec_kernels_vbmi2;

#endif
