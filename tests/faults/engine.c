/* Transfers that stop half way or fail, in any engine; completions that arrive late and in any
 * order. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "io/checked.h"
#include "io/engine.h"
#include "stream/journal.h"
#include "tests/faults/faults.h"

bool __real_perta_request_advance(struct perta_request *request, int64_t got);
bool __wrap_perta_request_advance(struct perta_request *request, int64_t got);
int __real_perta_engine_open(enum perta_io_mode mode, unsigned depth, struct perta_engine **out,
                             struct perta_err *err);
int __wrap_perta_engine_open(enum perta_io_mode mode, unsigned depth, struct perta_engine **out,
                             struct perta_err *err);

/* Pretend that fewer than got bytes were read, but more than before; the rest of the buffer is
 * overwritten. */
static int64_t cut_short(const struct perta_request *r, int64_t got)
{
    uint64_t start = perta_align_down(r->off_bytes, r->file->direct ? PERTA_BLOCK_BYTES : 1);
    uint64_t least = r->reached > r->at ? r->reached - r->at + 1 : 1;
    if ((uint64_t)got <= least)
        return got;
    uint64_t keep = least + fault_random((uint64_t)got - least);
    if (!r->write)
        memset(r->buf + (r->at - start) + keep, 0xA5, (uint64_t)got - keep);
    return (int64_t)keep;
}

bool __wrap_perta_request_advance(struct perta_request *r, int64_t got)
{
    int failed = fault_strikes(r->write ? "write" : "read");
    if (r->write)
        fault_strikes("any");
    if (failed)
        got = -failed;
    else if (fault_chance(fault_plan()->again))
        got = fault_random(2) ? -EINTR : -EAGAIN;
    else if (got > 0 && fault_chance(fault_plan()->short_))
        got = cut_short(r, got);
    return __real_perta_request_advance(r, got);
}

int __real_perta_journal_commit(struct perta_journal *journal, const json_t *record, uint64_t bytes,
                                struct perta_err *err);
int __wrap_perta_journal_commit(struct perta_journal *journal, const json_t *record, uint64_t bytes,
                                struct perta_err *err);
int __wrap_perta_journal_commit(struct perta_journal *journal, const json_t *record, uint64_t bytes,
                                struct perta_err *err)
{
    int rc = __real_perta_journal_commit(journal, record, bytes, err);
    if (!rc)
        fault_strikes("commit");
    return rc;
}

struct late {
    struct perta_engine base;
    struct perta_engine_ops ops;
    struct perta_engine *inner;
    struct held *first; /* all requests in flight */
};

struct held {
    struct late *late;
    struct perta_request *request;
    void (*done)(struct perta_request *request);
    void *user;
    bool is_done;
    struct held *next;
};

static void on_done(struct perta_request *request)
{
    ((struct held *)request->user)->is_done = true;
}

static void late_submit(struct perta_engine *engine, struct perta_request *request)
{
    struct late *late = (struct late *)engine;
    struct held *held = __real_malloc(sizeof *held);
    if (!held)
        abort();
    *held = (struct held){late, request, request->done, request->user, false, late->first};
    late->first = held;
    request->done = on_done;
    request->user = held;
    late->inner->n_in_flight++;
    late->inner->ops->submit(late->inner, request);
}

static unsigned count_done(const struct late *late)
{
    unsigned n = 0;
    for (const struct held *h = late->first; h; h = h->next)
        n += h->is_done;
    return n;
}

/* Report the nth of the completed requests. */
static void report(struct late *late, uint64_t nth)
{
    struct held **at = &late->first;
    while (*at && (!(*at)->is_done || nth--))
        at = &(*at)->next;
    struct held *held = *at;
    if (!held)
        abort();
    *at = held->next;
    held->request->done = held->done;
    held->request->user = held->user;
    late->base.n_in_flight--;
    if (!held->request->write)
        fault_after_read();
    held->done(held->request);
    free(held);
}

static int late_wait(struct perta_engine *engine, struct perta_err *err)
{
    struct late *late = (struct late *)engine;
    unsigned n = count_done(late);
    int rc = !n || late->inner->n_in_flight ? late->inner->ops->wait(late->inner, err) : 0;
    bool some = false;
    while (!rc && (n = count_done(late)) &&
           !fault_chance(some || late->inner->n_in_flight ? fault_plan()->late : 0)) {
        report(late, fault_random(n));
        some = true;
    }
    return rc;
}

static void late_wake(struct perta_engine *engine)
{
    struct late *late = (struct late *)engine;
    late->inner->ops->wake(late->inner);
}

static void late_release(struct perta_engine *engine, struct perta_request *request)
{
    perta_engine_release(((struct late *)engine)->inner, request);
}

static int late_check(struct perta_engine *engine, struct perta_err *err)
{
    return perta_engine_check(((struct late *)engine)->inner, err);
}

static void late_close(struct perta_engine *engine)
{
    perta_engine_close(((struct late *)engine)->inner);
    free(engine);
}

int __wrap_perta_engine_open(enum perta_io_mode mode, unsigned depth, struct perta_engine **out,
                             struct perta_err *err)
{
    struct late *late = __real_calloc(1, sizeof *late);
    if (!late)
        abort();
    int rc = __real_perta_engine_open(mode, depth, &late->inner, err);
    if (rc) {
        free(late);
        return rc;
    }
    late->ops = (struct perta_engine_ops){
        .name = late->inner->ops->name,
        .submit = late_submit,
        .wait = late_wait,
        .wake = late_wake,
        .release = late_release,
        .check = late_check,
        .close = late_close,
    };
    late->base =
        (struct perta_engine){.ops = &late->ops, .wants_direct = late->inner->wants_direct};
    *out = &late->base;
    return 0;
}
