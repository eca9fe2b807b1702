/* The pieces of a slot: which of them are read together, and where their bytes are stored. */
#include "tests/unit.h"

#include "stream/slot.h"

enum { N_IN = 3 };

static struct perta_err err;
static struct perta_file files[N_IN];

static struct perta_job job_of(uint64_t piece_bytes)
{
    return (struct perta_job){
        .n_in = N_IN, .in_bytes_max = N_IN * piece_bytes, .out_bytes_max = piece_bytes};
}

/* The same bytes of every input, except of the one left out. */
static struct perta_piece piece_at(struct perta_range *in, uint64_t off_bytes, uint64_t len_bytes,
                                   int left_out)
{
    for (int i = 0; i < N_IN; i++)
        in[i] = i == left_out ? (struct perta_range){0}
                              : (struct perta_range){.file = &files[i],
                                                     .off_bytes = off_bytes,
                                                     .len_bytes = len_bytes};
    return (struct perta_piece){.in = in, .out_bytes = len_bytes};
}

START_TEST(small_pieces_that_touch_are_one_read_of_each_input)
{
    struct perta_job job = job_of(34);
    struct perta_slot_shape shape = perta_slot_shape_for(&job);
    struct perta_range in[N_IN];
    struct perta_slot slot;
    uint8_t *memory = alloc(perta_slot_pool_bytes(&shape));
    ck_assert_ok(perta_slot_init(&slot, &shape, memory, &err));
    for (int round = 0; round < 2; round++) {
        perta_slot_clear(&slot);
        for (uint64_t at = 0;; at += 34) {
            struct perta_piece piece = piece_at(in, at, 34, -1);
            if (!perta_slot_add(&slot, &shape, &piece))
                break;
        }
        ck_assert_uint_eq(slot.n_pieces, shape.pieces_max);
        ck_assert_uint_eq(slot.n_reads, N_IN);
        for (uint32_t r = 0; r < N_IN; r++)
            ck_assert_uint_eq(slot.reads[r].request.len_bytes, 34ull * shape.pieces_max);
    }
    perta_slot_release(&slot);
    free(memory);
}
END_TEST

/* Every range gets its bytes from a read, at its own place, within the room of the slot. */
static void check_room(struct perta_slot *slot, const struct perta_slot_shape *shape)
{
    const uint8_t *at = slot->in;
    perta_slot_lay_out(slot);
    for (uint32_t r = 0; r < slot->n_reads; r++) {
        struct perta_request *request = &slot->reads[r].request;
        ck_assert_ptr_eq(request->buf, at);
        at += perta_read_room(request->len_bytes);
        request->data = (const uint8_t *)(uintptr_t)request->off_bytes; /* identifies the read */
    }
    ck_assert_uint_le((uint64_t)(at - slot->in), shape->in_max);
    perta_slot_point(slot);
    for (uint32_t p = 0; p < slot->n_pieces; p++) {
        const struct perta_piece *piece = &slot->pieces[p];
        ck_assert_uint_le((uint64_t)(piece->out - slot->out) + piece->out_bytes, shape->out_max);
        for (int i = 0; i < N_IN; i++)
            if (piece->in[i].file && piece->in[i].len_bytes)
                ck_assert_uint_eq((uintptr_t)piece->in[i].data, piece->in[i].off_bytes);
    }
}

START_TEST(whatever_fits_has_room)
{
    enum { MOST = 70000 };
    uint64_t seed = 3, n_pieces = 0, n_reads = 0;
    struct perta_job job = job_of(MOST);
    struct perta_slot_shape shape = perta_slot_shape_for(&job);
    struct perta_range in[N_IN];
    struct perta_slot slot;
    uint8_t *memory = alloc(perta_slot_pool_bytes(&shape));
    ck_assert_ok(perta_slot_init(&slot, &shape, memory, &err));
    for (uint64_t at = 1, end = 0; n_pieces < 20000; at = end) {
        perta_slot_clear(&slot);
        for (;; at = end) {
            uint64_t random = next_random(&seed), len = random % 50 ? random % 97 : MOST;
            if (random % 11 == 0)
                at += 1 + random % 9000; /* leaves a gap */
            struct perta_piece piece = piece_at(in, at, len, random % 5 ? -1 : 1);
            if (!perta_slot_add(&slot, &shape, &piece))
                break;
            end = at + len;
        }
        ck_assert_uint_gt(slot.n_pieces, 0);
        check_room(&slot, &shape);
        n_pieces += slot.n_pieces;
        n_reads += slot.n_reads;
    }
    ck_assert_uint_lt(n_reads, n_pieces);
    perta_slot_release(&slot);
    free(memory);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("slot");
    tcase_add_test(tests, small_pieces_that_touch_are_one_read_of_each_input);
    tcase_add_test(tests, whatever_fits_has_room);
    return run_suite("slot", tests);
}
