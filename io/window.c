#include "io/window.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "io/checked.h"
#include "io/pool.h"

/* The handler may read it at any time, on any thread. version is odd while the rest changes. */
struct perta_window {
    atomic_uint version;
    atomic_uintptr_t start, end; /* 0 and 0: unused */
    _Atomic(atomic_uintptr_t *) lost;
    struct perta_window *next_free; /* under lock */
};

/* Blocks of windows are never freed, so the handler can always walk all of them. */
#define WINDOWS_PER_BLOCK 128
struct block {
    struct perta_window windows[WINDOWS_PER_BLOCK];
    struct block *next;
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* never taken by the handler */
static unsigned n_open;
static _Thread_local unsigned n_open_here;  /* how many of them by this thread, */
static _Thread_local bool was_blocked_here; /* and was SIGBUS blocked on it before */
static struct perta_window *free_windows;
static _Atomic(struct block *) blocks;

/* The action for SIGBUS without us, set when our handler is installed. */
static struct sigaction before;
static atomic_bool before_is_spent; /* it was to be called only once (SA_RESETHAND), and it was */
static bool is_buried;              /* the host program has installed a handler over ours */
static struct sigaction over;       /* and this is it */

/* ---- the handler ---- */

/* Is address in this window? *lost: where to note it. */
static bool holds(struct perta_window *w, uintptr_t address, atomic_uintptr_t **lost)
{
    unsigned version = atomic_load(&w->version);
    bool in = address >= atomic_load(&w->start) && address < atomic_load(&w->end);
    *lost = atomic_load(&w->lost);
    return in && !(version & 1) && atomic_load(&w->version) == version;
}

static atomic_uintptr_t *find_lost(uintptr_t address)
{
    atomic_uintptr_t *lost;
    for (struct block *b = atomic_load(&blocks); b; b = b->next)
        for (unsigned i = 0; i < WINDOWS_PER_BLOCK; i++)
            if (holds(&b->windows[i], address, &lost))
                return lost;
    return NULL;
}

/* Map a page of zeros where a page could not be read, and note the address. */
static bool map_zeros(uintptr_t address)
{
    uintptr_t page_bytes = (uintptr_t)perta_page_bytes(), none = 0;
    atomic_uintptr_t *lost = find_lost(address);
    if (!lost || mmap((void *)(address & ~(page_bytes - 1)), page_bytes, PROT_READ,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
        return false;
    atomic_compare_exchange_strong(lost, &none, address);
    return true;
}

/* Act as if there were no handler: a fault recurs and kills the process; so does a signal that was
 * sent, unless it is ignored. */
static void do_default(int number, const siginfo_t *info, bool ignored)
{
    const struct sigaction none = {.sa_handler = SIG_DFL};
    if (info->si_code <= 0 && ignored)
        return;
    sigaction(number, &none, NULL);
    if (info->si_code <= 0)
        raise(number); /* delivered when this handler returns */
}

/* Block the signals that the kernel would block while the host program's handler runs. */
static void block_signals(int number)
{
    sigset_t own;
    pthread_sigmask(SIG_BLOCK, &before.sa_mask, NULL);
    sigemptyset(&own);
    sigaddset(&own, number);
    if (before.sa_flags & SA_NODEFER && !sigismember(&before.sa_mask, number))
        pthread_sigmask(SIG_UNBLOCK, &own, NULL);
}

/* Pass the signal on to the host program. Its handler may never return (siglongjmp). */
static void pass_on(int number, siginfo_t *info, void *context)
{
    bool ignored = before.sa_handler == SIG_IGN;
    if (before.sa_handler == SIG_DFL || ignored ||
        (before.sa_flags & (int)SA_RESETHAND && atomic_exchange(&before_is_spent, true))) {
        do_default(number, info, ignored);
        return;
    }
    block_signals(number);
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else
        before.sa_handler(number);
}

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    int error = errno;
    if (info->si_code != BUS_ADRERR || !map_zeros((uintptr_t)info->si_addr))
        pass_on(number, info, context);
    errno = error;
}

/* ---- installing it ---- */

static bool is_ours(const struct sigaction *action)
{
    return action->sa_flags & SA_SIGINFO && action->sa_sigaction == on_bus_error;
}

static bool is_same(const struct sigaction *a, const struct sigaction *b)
{
    return a->sa_flags & SA_SIGINFO ? b->sa_sigaction == a->sa_sigaction
                                    : b->sa_handler == a->sa_handler;
}

/* A handler that was installed over ours stays, whether it calls ours or not: if ours were
 * installed over it again, the two could call each other forever. */
static void install(void)
{
    struct sigaction now;
    sigaction(SIGBUS, NULL, &now);
    if (is_ours(&now) || (is_buried && is_same(&over, &now)))
        return;
    is_buried = false;
    before = now;
    atomic_store(&before_is_spent, false);
    struct sigaction action = {.sa_sigaction = on_bus_error};
    /* Use the stack that the host program's handler would use. */
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | (now.sa_flags & SA_RESTART);
    sigaction(SIGBUS, &action, NULL);
}

static void uninstall(void)
{
    struct sigaction now, none = {.sa_handler = SIG_DFL};
    sigaction(SIGBUS, NULL, &now);
    if (is_ours(&now)) {
        sigaction(SIGBUS, atomic_load(&before_is_spent) ? &none : &before, NULL);
        is_buried = false;
    } else if (now.sa_handler != SIG_DFL || now.sa_flags & SA_SIGINFO) {
        is_buried = true;
        over = now;
    }
}

/* Block or unblock SIGBUS on the calling thread. Returns whether it was blocked. */
static bool block(bool blocked)
{
    sigset_t set, old;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(blocked ? SIG_BLOCK : SIG_UNBLOCK, &set, &old);
    return sigismember(&old, SIGBUS);
}

void perta_windows_open(void)
{
    pthread_mutex_lock(&lock);
    if (!n_open++)
        install();
    pthread_mutex_unlock(&lock);
    if (!n_open_here++)
        was_blocked_here = block(false);
}

void perta_windows_close(void)
{
    if (n_open_here && !--n_open_here && was_blocked_here)
        block(true);
    pthread_mutex_lock(&lock);
    if (!--n_open)
        uninstall();
    pthread_mutex_unlock(&lock);
}

/* ---- windows ---- */

static void set(struct perta_window *w, uintptr_t start, uintptr_t end, atomic_uintptr_t *lost)
{
    atomic_fetch_add(&w->version, 1);
    atomic_store(&w->start, start);
    atomic_store(&w->end, end);
    atomic_store(&w->lost, lost);
    atomic_fetch_add(&w->version, 1);
}

static void add_block(void)
{
    struct block *b = calloc(1, sizeof *b);
    if (!b)
        return;
    for (unsigned i = 0; i < WINDOWS_PER_BLOCK; i++) {
        b->windows[i].next_free = free_windows;
        free_windows = &b->windows[i];
    }
    b->next = atomic_load(&blocks);
    atomic_store(&blocks, b);
}

struct perta_window *perta_window_add(const void *map, size_t len_bytes, atomic_uintptr_t *lost)
{
    pthread_mutex_lock(&lock);
    if (!free_windows)
        add_block();
    struct perta_window *w = free_windows;
    if (w)
        free_windows = w->next_free;
    pthread_mutex_unlock(&lock);
    if (w)
        set(w, (uintptr_t)map, (uintptr_t)map + perta_align_up(len_bytes, perta_page_bytes()),
            lost);
    return w;
}

void perta_window_remove(struct perta_window *w)
{
    if (!w)
        return;
    set(w, 0, 0, NULL);
    pthread_mutex_lock(&lock);
    w->next_free = free_windows;
    free_windows = w;
    pthread_mutex_unlock(&lock);
}
