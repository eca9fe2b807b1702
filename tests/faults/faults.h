/* faults.h - the command on an unreliable disk. build/tests/perta_faulty is `perta`, linked so that
 * its calls of the system (ld --wrap) and of its engine go through this code first.
 *
 * PERTA_FAULTS in the environment says what happens, as NAME=VALUE separated by commas:
 *   seed=N         seed of everything random
 *   short=P        P of 1000 transfers stop somewhere in the middle
 *   again=P        P of 1000 are interrupted (EINTR) or must be repeated (EAGAIN)
 *   late=P         P of 1000 completions are delayed, and arrive in any order
 *   fail=KIND:N:E  the Nth operation of that kind fails with errno E: read, write (in the engine),
 *                  put (a write outside of it, of which half is done), pread, text, list (reads
 *                  outside of it: by offset, of lines and small files, of names in folders), sync,
 *                  create, mkdir, rename, unlink, truncate, allocate, enter (an io_uring), memory
 *                  (an allocation)
 *   forever=1      and so do all later operations of that kind
 *   signal=KIND:N:S  before the Nth operation of that kind the process sends itself signal S;
 *                  kinds are those above, commit (a record that is synced to the journal; the
 *                  signal comes after it) and any (every kind except reads)
 *   shrink=N:PATH  after N reads the file loses its second half
 *   touch=N:PATH   after N reads one byte in the middle of the file changes
 *   shutdown=N:DIR before the Nth operation that changes it, the file system is cut off
 *   fast=1         skip syncing, which takes long and makes no difference here
 *   log=FILE       log all of these there, for tests/python/powercut.py
 *   count=FILE     write how many operations of each kind there were, at the end */
#ifndef PERTA_TESTS_FAULTS_H
#define PERTA_TESTS_FAULTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct fault_plan {
    unsigned short_, again, late; /* out of 1000 */
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
/* Allocations that do not fail. */
void *__real_malloc(size_t n);
void *__real_calloc(size_t n, size_t each);
/* A random number below n. */
uint64_t fault_random(uint64_t n);
bool fault_chance(unsigned of_1000);
/* Count an operation of that kind, and send the signal if the plan says so. Returns 0, or the errno
 * that the operation must fail with. */
int fault_strikes(const char *kind);
/* Call after each read of the engine. */
void fault_after_read(void);

#endif
