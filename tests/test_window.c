/* Bus errors: those of mapped inputs are handled by the library, all others by the host program, as
 * if the library did not exist. Each case runs in a process of its own. */
#include "tests/scratch.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>

#include "io/pool.h"
#include "io/thread.h"
#include "io/window.h"
#include "tests/engines.h"

static struct perta_err err;

/* ---- the host program ---- */

static sigjmp_buf back;
static volatile sig_atomic_t n_called;
static void *volatile called_with;
static sigset_t mask_there; /* signals that were blocked when the handler was called */

static void note_call(void)
{
    n_called++;
    pthread_sigmask(SIG_BLOCK, NULL, &mask_there);
    siglongjmp(back, 1);
}

static void with_info(int number, siginfo_t *info, void *context)
{
    if (number != SIGBUS || !context)
        abort();
    called_with = info->si_addr;
    note_call();
}

static void without_info(int number)
{
    if (number != SIGBUS)
        abort();
    note_call();
}

static void host_installs(int flags, void (*handler)(int))
{
    struct sigaction action = {.sa_flags = flags};
    if (flags & SA_SIGINFO)
        action.sa_sigaction = with_info;
    else
        action.sa_handler = handler;
    sigaddset(&action.sa_mask, SIGUSR1);
    ck_assert_int_eq(sigaction(SIGBUS, &action, NULL), 0);
}

/* A page of the host's own file, which has been truncated. */
static const volatile uint8_t *bad_page(void)
{
    int fd = open("host", O_RDWR | O_CREAT | O_TRUNC, 0600);
    size_t page = perta_page_bytes();
    ck_assert_int_eq(ftruncate(fd, (off_t)page), 0);
    void *map = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, 0);
    ck_assert_ptr_ne(map, MAP_FAILED);
    ck_assert_int_eq(ftruncate(fd, 0), 0);
    close(fd);
    return map;
}

static uint8_t touched;

/* A bus error of the host: its handler is called once more, with the address. */
static void host_is_called(void)
{
    const volatile uint8_t *page = bad_page();
    int before = n_called;
    called_with = NULL;
    if (!sigsetjmp(back, 1))
        touched = page[3];
    ck_assert_int_eq(n_called, before + 1);
    ck_assert(!called_with || called_with == (const void *)(uintptr_t)(page + 3));
}

/* The exit status of a process that calls act. */
static int status_of(void (*act)(void))
{
    int status;
    pid_t pid = fork();
    if (!pid) {
        act();
        _exit(0);
    }
    ck_assert_int_eq(waitpid(pid, &status, 0), pid);
    return status;
}

static void fault(void)
{
    touched = bad_page()[3];
}

static void send(void)
{
    raise(SIGBUS);
}

/* ---- the library ---- */

struct mapping {
    struct perta_engine *engine;
    struct perta_file file;
    struct perta_request request;
    const char *name;
    uint64_t len;
};

static void on_read(struct perta_request *request)
{
    ck_assert_int_eq(request->sys_errno, 0);
}

static struct mapping *mapping_open(const char *name)
{
    struct mapping *m = alloc(sizeof *m);
    m->name = name;
    m->len = 4 * perta_page_bytes();
    free(make_file(name, m->len, 1));
    ck_assert_ok(perta_engine_open(PERTA_IO_MMAP, 1, &m->engine, &err));
    ck_assert_ok(perta_file_open(&m->file, name, false, &err));
    m->request = (struct perta_request){.file = &m->file, .len_bytes = m->len, .done = on_read};
    perta_engine_submit(m->engine, &m->request);
    ck_assert_ok(perta_engine_drain(m->engine, &err));
    return m;
}

static void mapping_close(struct mapping *m)
{
    perta_engine_release(m->engine, &m->request);
    perta_engine_close(m->engine);
    perta_file_close(&m->file);
    free(m);
}

/* Truncate the file to half its size. */
static void shrink(const struct mapping *m)
{
    ck_assert_int_eq(truncate(m->name, (off_t)(m->len / 2)), 0);
}

static void *touch_all(void *arg)
{
    const struct mapping *m = arg;
    volatile uint8_t byte;
    for (uint64_t i = 0; i < m->len; i++)
        byte = m->request.data[i];
    (void)byte;
    return NULL;
}

/* The file shrinks, is used all the same, and then this engine reports it. */
static void ours_is_mended(struct mapping *m)
{
    ck_assert_ok(perta_engine_check(m->engine, &err));
    shrink(m);
    touch_all(m);
    struct perta_err e = {0};
    ck_assert_int_eq(perta_engine_check(m->engine, &e), PERTA_EINPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, m->name));
}

/* ---- cases ---- */

static void both_are_served(int flags)
{
    host_installs(flags, without_info);
    struct mapping *m = mapping_open("f");
    host_is_called();
    ours_is_mended(m);
    host_is_called(); /* and the library's handler is still installed after both */
    struct mapping *second = mapping_open("g");
    ours_is_mended(second);
    mapping_close(second);
    mapping_close(m);
    host_is_called();
}

START_TEST(a_handler_with_info_is_called_for_its_own_errors)
{
    both_are_served(SA_SIGINFO);
    ck_assert_ptr_nonnull(called_with);
}
END_TEST

START_TEST(a_handler_without_info_is_called_for_its_own_errors)
{
    both_are_served(0);
}
END_TEST

#ifdef __SANITIZE_THREAD__ /* the thread sanitizer blocks all signals while a handler runs */
enum { MASKS_ARE_THE_KERNELS = false };
#else
enum { MASKS_ARE_THE_KERNELS = true };
#endif

START_TEST(signals_are_blocked_as_the_host_program_asked)
{
    static const int flags[] = {SA_SIGINFO, SA_SIGINFO | SA_NODEFER, 0, SA_NODEFER};
    for (int i = 0; i < 4; i++) {
        host_installs(flags[i], without_info);
        struct mapping *m = mapping_open("f");
        host_is_called();
        ck_assert_int_eq(sigismember(&mask_there, SIGUSR1), 1);
        ck_assert_int_eq(sigismember(&mask_there, SIGUSR2), 0);
        ck_assert_int_eq(sigismember(&mask_there, SIGBUS), !(flags[i] & SA_NODEFER));
        mapping_close(m);
    }
}
END_TEST

START_TEST(without_a_handler_the_process_dies_of_it)
{
    void (*const dispositions[])(int) = {SIG_DFL, SIG_IGN};
    for (int i = 0; i < 2; i++) {
        signal(SIGBUS, dispositions[i]);
        struct mapping *m = mapping_open("f");
        int status = status_of(fault); /* the kernel does not let this signal be ignored */
        ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
        status = status_of(send);
        ck_assert(i ? WIFEXITED(status) : WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
        ours_is_mended(m);
        mapping_close(m);
        ck_assert(signal(SIGBUS, SIG_DFL) == dispositions[i]);
    }
}
END_TEST

START_TEST(a_handler_for_one_time_is_called_once)
{
    host_installs(SA_SIGINFO | (int)SA_RESETHAND, NULL);
    struct mapping *m = mapping_open("f");
    host_is_called();
    ours_is_mended(m);
    int status = status_of(fault);
    ck_assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    mapping_close(m);
    ck_assert(signal(SIGBUS, SIG_DFL) == SIG_DFL);
}
END_TEST

START_TEST(the_last_engine_to_close_puts_back_what_was_there)
{
    struct sigaction now;
    host_installs(SA_NODEFER | SA_RESTART, without_info);
    for (int round = 0; round < 3; round++) {
        struct mapping *a = mapping_open("f"), *b = mapping_open("g");
        sigaction(SIGBUS, NULL, &now);
        ck_assert(now.sa_handler != without_info);
        mapping_close(a);
        sigaction(SIGBUS, NULL, &now);
        ck_assert(now.sa_handler != without_info);
        mapping_close(b);
        sigaction(SIGBUS, NULL, &now);
        ck_assert(now.sa_handler == without_info);
        ck_assert_int_eq(now.sa_flags & (SA_SIGINFO | SA_NODEFER | SA_RESTART),
                         SA_NODEFER | SA_RESTART);
        ck_assert_int_eq(sigismember(&now.sa_mask, SIGUSR1), 1);
    }
}
END_TEST

static struct sigaction under; /* the handler that the next one replaced */

static void over_handler(int number, siginfo_t *info, void *context)
{
    if (++n_called == 20) /* stop handlers that call each other without end */
        abort();
    if (under.sa_flags & SA_SIGINFO)
        under.sa_sigaction(number, info, context);
    else if (under.sa_handler == SIG_DFL)
        siglongjmp(back, 1);
}

START_TEST(a_handler_put_over_ours_stays_and_may_call_it)
{
    struct sigaction now, over = {.sa_sigaction = over_handler, .sa_flags = SA_SIGINFO};
    host_installs(SA_SIGINFO, NULL);
    struct mapping *m = mapping_open("f");
    sigaction(SIGBUS, &over, &under);
    ours_is_mended(m);
    mapping_close(m);
    sigaction(SIGBUS, NULL, &now);
    ck_assert(now.sa_sigaction == over_handler);
    n_called = 0;
    if (!sigsetjmp(back, 1))
        touched = bad_page()[3];
    ck_assert_int_eq(n_called, 2); /* this one, and the first */
    m = mapping_open("g");
    ours_is_mended(m);
    n_called = 0;
    if (!sigsetjmp(back, 1))
        touched = bad_page()[3];
    ck_assert_int_eq(n_called, 2);
    mapping_close(m);
}
END_TEST

START_TEST(each_engine_knows_its_own_whoever_touches_it)
{
    pthread_t threads[4];
    struct mapping *m[3];
    static const char *const names[] = {"a", "b", "c"};
    for (int i = 0; i < 3; i++)
        m[i] = mapping_open(names[i]);
    shrink(m[0]);
    shrink(m[2]);
    for (int i = 0; i < 4; i++)
        ck_assert_int_eq(perta_thread_start(&threads[i], touch_all, m[i % 2]), 0);
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i], NULL);
    struct perta_err e = {0};
    ck_assert_int_eq(perta_engine_check(m[0]->engine, &e), PERTA_EINPUT);
    ck_assert_ok(perta_engine_check(m[1]->engine, &err));
    ck_assert_ok(perta_engine_check(m[2]->engine, &err)); /* nothing touched it */
    for (int i = 0; i < 3; i++)
        mapping_close(m[i]);
}
END_TEST

START_TEST(a_signal_that_the_host_program_blocks_is_let_through_meanwhile)
{
    sigset_t set, now;
    pthread_t thread;
    sigemptyset(&set);
    sigaddset(&set, SIGBUS);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    struct mapping *m = mapping_open("f"), *other = mapping_open("g");
    shrink(m);
    ck_assert_int_eq(perta_thread_start(&thread, touch_all, m),
                     0); /* it inherits the signal mask */
    pthread_join(thread, NULL);
    mapping_close(m);
    ours_is_mended(other);
    mapping_close(other);
    pthread_sigmask(SIG_BLOCK, NULL, &now);
    ck_assert_int_eq(sigismember(&now, SIGBUS), 1);
}
END_TEST

START_TEST(what_was_a_window_is_the_host_programs_again)
{
    host_installs(SA_SIGINFO, NULL);
    struct mapping *m = mapping_open("f"), *other = mapping_open("g");
    void *was = m->request.map;
    size_t len = m->request.map_bytes;
    perta_engine_release(m->engine, &m->request);
    int fd = open("f", O_RDONLY);
    void *map = mmap(was, len, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
    ck_assert_ptr_eq(map, was);
    shrink(m);
    int before = n_called;
    if (!sigsetjmp(back, 1))
        touched = ((const volatile uint8_t *)map)[len - 1];
    ck_assert_int_eq(n_called, before + 1);
    ck_assert_ok(perta_engine_check(m->engine, &err));
    munmap(map, len);
    close(fd);
    mapping_close(other);
    mapping_close(m);
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("window");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, a_handler_with_info_is_called_for_its_own_errors);
    tcase_add_test(tests, a_handler_without_info_is_called_for_its_own_errors);
    if (MASKS_ARE_THE_KERNELS)
        tcase_add_test(tests, signals_are_blocked_as_the_host_program_asked);
    tcase_add_test(tests, without_a_handler_the_process_dies_of_it);
    tcase_add_test(tests, a_handler_for_one_time_is_called_once);
    tcase_add_test(tests, the_last_engine_to_close_puts_back_what_was_there);
    tcase_add_test(tests, a_handler_put_over_ours_stays_and_may_call_it);
    tcase_add_test(tests, each_engine_knows_its_own_whoever_touches_it);
    tcase_add_test(tests, a_signal_that_the_host_program_blocks_is_let_through_meanwhile);
    tcase_add_test(tests, what_was_a_window_is_the_host_programs_again);
    return run_suite("window", tests);
}
