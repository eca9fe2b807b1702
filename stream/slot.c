#include "stream/slot.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"

#define RANGES_MAX 4096
#define PIECES_MAX 512
#define READS_MAX 512
/* If all pieces are small, a slot still has room for many, because a slot's way through the loop
 * costs as much as work on some KiB. */
#define ROOM_BYTES (1ull << 20)
#define OUT_ALIGN 64

/* Room for the ranges, or the results, of one large piece or many small ones. */
static uint64_t room_for(uint64_t piece_bytes, uint32_t pieces_max)
{
    uint64_t many = piece_bytes < ROOM_BYTES ? piece_bytes * pieces_max : 0;
    many = many < ROOM_BYTES ? many : ROOM_BYTES;
    return piece_bytes > many ? piece_bytes : many;
}

struct perta_slot_shape perta_slot_shape_for(const struct perta_job *job)
{
    uint32_t n_in = job->n_in ? job->n_in : 1;
    uint32_t pieces = RANGES_MAX / n_in;
    pieces = pieces > PIECES_MAX ? PIECES_MAX : pieces ? pieces : 1;
    uint64_t in_bytes = room_for(job->in_bytes_max, pieces) + (uint64_t)n_in * PERTA_READ_OVERHANG;
    uint64_t out_bytes = room_for(perta_align_up(job->out_bytes_max, OUT_ALIGN), pieces);
    return (struct perta_slot_shape){
        .pieces_max = pieces,
        .reads_max = n_in < READS_MAX ? READS_MAX : n_in,
        .n_in = n_in,
        .in_max = perta_align_up(in_bytes, PERTA_BLOCK_BYTES),
        .out_max = perta_align_up(out_bytes, PERTA_BLOCK_BYTES),
    };
}

uint64_t perta_slot_pool_bytes(const struct perta_slot_shape *shape)
{
    return shape->in_max + shape->out_max;
}

uint64_t perta_slot_heap_bytes(const struct perta_slot_shape *shape)
{
    uint64_t ranges = (uint64_t)shape->pieces_max * shape->n_in;
    return shape->pieces_max * sizeof(struct perta_piece) + ranges * sizeof(struct perta_range) +
           shape->reads_max * sizeof(struct perta_slot_read) + shape->n_in * sizeof(uint32_t);
}

int perta_slot_init(struct perta_slot *slot, const struct perta_slot_shape *shape, uint8_t *memory,
                    struct perta_err *err)
{
    size_t ranges = (size_t)shape->pieces_max * shape->n_in;
    *slot = (struct perta_slot){.in = memory, .out = memory + shape->in_max};
    slot->pieces = calloc(shape->pieces_max, sizeof *slot->pieces);
    slot->ranges = calloc(ranges, sizeof *slot->ranges);
    slot->reads = calloc(shape->reads_max, sizeof *slot->reads);
    slot->last = calloc(shape->n_in, sizeof *slot->last);
    if (!slot->pieces || !slot->ranges || !slot->reads || !slot->last)
        return perta_fail_sys(err, ENOMEM, "slots");
    return 0;
}

void perta_slot_release(struct perta_slot *slot)
{
    free(slot->pieces);
    free(slot->ranges);
    free(slot->reads);
    free(slot->last);
}

void perta_slot_clear(struct perta_slot *slot)
{
    for (uint32_t r = 0; r < slot->n_reads; r++)
        slot->last[slot->reads[r].input] = 0;
    slot->n_pieces = slot->n_reads = slot->n_pending = slot->n_good = 0;
    slot->in_bytes = slot->out_bytes = 0;
    slot->err.code = 0;
}

/* The previous piece's read of this input, if the range continues it; else NULL. */
static struct perta_slot_read *continued(const struct perta_slot *slot, uint32_t input,
                                         const struct perta_range *range)
{
    if (!slot->last[input])
        return NULL;
    struct perta_slot_read *read = &slot->reads[slot->last[input] - 1];
    bool continues = read->first_piece + read->n_pieces == slot->n_pieces &&
                     read->request.file == range->file &&
                     read->request.off_bytes + read->request.len_bytes == range->off_bytes;
    return continues ? read : NULL;
}

static bool is_read(const struct perta_range *range)
{
    return range->file && range->len_bytes;
}

static bool fits(const struct perta_slot *slot, const struct perta_slot_shape *shape,
                 const struct perta_piece *piece, uint64_t *in_bytes)
{
    uint32_t n_reads = slot->n_reads;
    *in_bytes = slot->in_bytes;
    for (uint32_t i = 0; i < shape->n_in; i++) {
        const struct perta_range *range = &piece->in[i];
        if (!is_read(range))
            continue;
        const struct perta_slot_read *read = continued(slot, i, range);
        uint64_t before = read ? read->request.len_bytes : 0;
        *in_bytes +=
            perta_read_room(before + range->len_bytes) - (read ? perta_read_room(before) : 0);
        n_reads += !read;
    }
    return slot->n_pieces < shape->pieces_max && n_reads <= shape->reads_max &&
           *in_bytes <= shape->in_max &&
           slot->out_bytes + perta_align_up(piece->out_bytes, OUT_ALIGN) <= shape->out_max;
}

static void add_read(struct perta_slot *slot, uint32_t input, const struct perta_range *range)
{
    struct perta_slot_read *read = continued(slot, input, range);
    if (!read) {
        read = &slot->reads[slot->n_reads++];
        *read = (struct perta_slot_read){.input = input, .first_piece = slot->n_pieces};
        read->request.file = range->file;
        read->request.off_bytes = range->off_bytes;
        read->request.user = slot;
        slot->last[input] = slot->n_reads;
    }
    read->request.len_bytes += range->len_bytes;
    read->n_pieces++;
}

bool perta_slot_add(struct perta_slot *slot, const struct perta_slot_shape *shape,
                    const struct perta_piece *piece)
{
    uint64_t in_bytes;
    if (!fits(slot, shape, piece, &in_bytes))
        return false;
    for (uint32_t i = 0; i < shape->n_in; i++)
        if (is_read(&piece->in[i]))
            add_read(slot, i, &piece->in[i]);
    struct perta_piece *to = &slot->pieces[slot->n_pieces];
    *to = *piece;
    to->in = slot->ranges + (uint64_t)slot->n_pieces * shape->n_in;
    to->out = slot->out + slot->out_bytes;
    memcpy(to->in, piece->in, shape->n_in * sizeof *to->in);
    slot->n_pieces++;
    slot->in_bytes = in_bytes;
    slot->out_bytes += perta_align_up(piece->out_bytes, OUT_ALIGN);
    return true;
}

void perta_slot_lay_out(struct perta_slot *slot)
{
    uint8_t *at = slot->in;
    for (uint32_t r = 0; r < slot->n_reads; r++) {
        slot->reads[r].request.buf = at;
        at += perta_read_room(slot->reads[r].request.len_bytes);
    }
}

void perta_slot_point(struct perta_slot *slot)
{
    for (uint32_t r = 0; r < slot->n_reads; r++) {
        const struct perta_slot_read *read = &slot->reads[r];
        const uint8_t *data = read->request.data;
        for (uint32_t p = 0; p < read->n_pieces; p++) {
            struct perta_range *range = &slot->pieces[read->first_piece + p].in[read->input];
            range->data = data;
            data += range->len_bytes;
        }
    }
}
