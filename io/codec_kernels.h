/* codec_kernels.h - what codec_kernels.c gives for each instruction set. Internal to io/.
 *
 * Units are 1, 2, 4 or 8 bytes wide; n is in units; nothing needs to be aligned. ordered:
 * units are sign-and-magnitude floats, mapped to integers in the order of the floats first. */
#ifndef PERTA_IO_CODEC_KERNELS_H
#define PERTA_IO_CODEC_KERNELS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct perta_codec_kernels {
    /* z (n) = zigzag(map(after) - map(before)); returns how many are not zero. */
    uint64_t (*delta)(unsigned width, bool ordered, const void *before, const void *after,
                      void *z, size_t n);
    /* to (n) = unmap(map(from) + sign * unzigzag(z)), sign 1 or -1. */
    void (*add)(unsigned width, bool ordered, const void *from, const void *z, int sign,
                void *to, size_t n);
    /* Byte b of unit i of z goes to planes[b * n + i], and back. */
    void (*split)(unsigned width, const void *z, uint8_t *planes, size_t n);
    void (*join)(unsigned width, const uint8_t *planes, void *z, size_t n);
};

extern const struct perta_codec_kernels perta_codec_kernels_v2, perta_codec_kernels_v3,
    perta_codec_kernels_v4;

#endif
