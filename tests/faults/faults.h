/* faults.h - the command on a disk that lies: build/tests/perta_faulty is `perta`, linked so that
 * what it asks of the system (ld --wrap) and of its engine goes through here first.
 *
 * PERTA_FAULTS in the environment says what happens, NAME=VALUE separated by commas:
 *   seed=N         of all that is random
 *   short=P        of 1000 transfers so many break off somewhere in the middle
 *   again=P        so many are interrupted (EINTR) or told to come again (EAGAIN)
 *   late=P         so many completions are held back, and come in any order
 *   fail=KIND:N:E  the Nth operation of that kind fails with errno E: read, write (of the
 *                  engine), put (of what is written past it, half of it is), pread, text, list
 *                  (reads past the engine: by offset, of lines and the like, of names in folders),
 *                  sync, create, mkdir, rename, unlink, truncate, allocate,
 *                  enter (an io_uring), memory (each time that some is asked for)
 *   forever=1      and all that follow
 *   signal=KIND:N:S  before the Nth of that kind the process sends itself signal S; kinds are
 *                  those above, commit (a record that is in the journal, synced: the signal comes
 *                  after it) and any (all but reads)
 *   shrink=N:PATH  after N reads the file loses its second half
 *   touch=N:PATH   after N reads one byte in the middle of the file is another
 *   shutdown=N:DIR before the Nth operation that changes a file system, it is cut off
 *   fast=1         syncing is left out: it takes long, and here nobody can tell
 *   log=FILE       all of these are logged there, for tests/python/powercut.py
 *   count=FILE     how many of each there were, at the end */
#ifndef PERTA_TESTS_FAULTS_H
#define PERTA_TESTS_FAULTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fault_plan {
    unsigned short_, again, late; /* of 1000 */
    char fail[16];
    uint64_t fail_at;
    int fail_errno;
    char signal[16];
    uint64_t signal_at;
    int signal_number;
    bool forever, fast;
    uint64_t shrink_at, touch_at, shutdown_at;
    const char *shrink, *touch, *shutdown, *log, *count;
};

const struct fault_plan *fault_plan(void);
/* Memory that does not fail. */
void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t each);
/* Below n. */
uint64_t fault_random(uint64_t n);
bool fault_chance(unsigned of_1000);
/* Count an operation of that kind, and signal where the plan says so. 0, or the errno that it
 * fails with. */
int fault_strikes(const char *kind);
/* A read of the engine is done. */
void fault_after_read(void);

#endif
