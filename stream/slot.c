#include "stream/slot.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"

#define RANGES_MAX 4096
#define PIECES_MAX 512
#define OUT_ALIGN 64

struct perta_slot_shape perta_slot_shape_for(const struct perta_job *job)
{
    uint32_t n_in = job->n_in ? job->n_in : 1;
    uint32_t pieces = RANGES_MAX / n_in;
    if (pieces > PIECES_MAX)
        pieces = PIECES_MAX;
    uint64_t overhang = (uint64_t)n_in * PERTA_READ_OVERHANG;
    return (struct perta_slot_shape){
        .pieces_max = pieces ? pieces : 1,
        .n_in = n_in,
        .in_max = perta_align_up(job->in_bytes_max + overhang, PERTA_BLOCK_BYTES),
        .out_max = perta_align_up(job->out_bytes_max + OUT_ALIGN, PERTA_BLOCK_BYTES),
    };
}

uint64_t perta_slot_pool_bytes(const struct perta_slot_shape *shape)
{
    return shape->in_max + shape->out_max;
}

uint64_t perta_slot_heap_bytes(const struct perta_slot_shape *shape)
{
    uint64_t ranges = (uint64_t)shape->pieces_max * shape->n_in;
    return shape->pieces_max * sizeof(struct perta_piece) +
           ranges * (sizeof(struct perta_range) + sizeof(struct perta_slot_read));
}

int perta_slot_init(struct perta_slot *slot, const struct perta_slot_shape *shape,
                    uint8_t *memory, struct perta_err *err)
{
    size_t ranges = (size_t)shape->pieces_max * shape->n_in;
    *slot = (struct perta_slot){.in = memory, .out = memory + shape->in_max};
    slot->pieces = calloc(shape->pieces_max, sizeof *slot->pieces);
    slot->ranges = calloc(ranges, sizeof *slot->ranges);
    slot->reads = calloc(ranges, sizeof *slot->reads);
    if (!slot->pieces || !slot->ranges || !slot->reads)
        return perta_fail_sys(err, ENOMEM, "slots");
    return 0;
}

void perta_slot_release(struct perta_slot *slot)
{
    free(slot->pieces);
    free(slot->ranges);
    free(slot->reads);
}

void perta_slot_clear(struct perta_slot *slot)
{
    slot->n_pieces = slot->n_reads = slot->n_pending = slot->n_good = 0;
    slot->in_bytes = slot->out_bytes = 0;
    slot->err.code = 0;
}

bool perta_slot_add(struct perta_slot *slot, const struct perta_slot_shape *shape,
                    const struct perta_piece *piece)
{
    /* As if every range were a read of its own; touching ones will need less. */
    uint64_t in_bytes = slot->in_bytes;
    for (uint32_t i = 0; i < shape->n_in; i++)
        if (piece->in[i].file)
            in_bytes += perta_read_room(piece->in[i].len_bytes);
    uint64_t out_bytes = slot->out_bytes + perta_align_up(piece->out_bytes, OUT_ALIGN);
    if (slot->n_pieces == shape->pieces_max || in_bytes > shape->in_max ||
        out_bytes > shape->out_max)
        return false;
    struct perta_piece *to = &slot->pieces[slot->n_pieces];
    *to = *piece;
    to->in = slot->ranges + (uint64_t)slot->n_pieces * shape->n_in;
    to->out = slot->out + slot->out_bytes;
    memcpy(to->in, piece->in, shape->n_in * sizeof *to->in);
    slot->n_pieces++;
    slot->in_bytes = in_bytes;
    slot->out_bytes = out_bytes;
    return true;
}

static bool touches(const struct perta_request *request, const struct perta_range *range)
{
    return request->file == range->file &&
           request->off_bytes + request->len_bytes == range->off_bytes;
}

void perta_slot_lay_out(struct perta_slot *slot, const struct perta_slot_shape *shape)
{
    uint64_t at = 0;
    for (uint32_t i = 0; i < shape->n_in; i++) {
        struct perta_slot_read *read = NULL;
        for (uint32_t p = 0; p < slot->n_pieces; p++) {
            const struct perta_range *range = &slot->pieces[p].in[i];
            if (!range->file || !range->len_bytes)
                continue;
            if (read && read->first_piece + read->n_pieces == p &&
                touches(&read->request, range)) {
                read->request.len_bytes += range->len_bytes;
                read->n_pieces++;
                continue;
            }
            if (read)
                at += perta_read_room(read->request.len_bytes);
            read = &slot->reads[slot->n_reads++];
            *read = (struct perta_slot_read){.input = i, .first_piece = p, .n_pieces = 1};
            read->request.file = range->file;
            read->request.off_bytes = range->off_bytes;
            read->request.len_bytes = range->len_bytes;
            read->request.buf = slot->in + at;
            read->request.user = slot;
        }
        if (read)
            at += perta_read_room(read->request.len_bytes);
    }
}

void perta_slot_point(struct perta_slot *slot, const struct perta_slot_shape *shape)
{
    (void)shape;
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
