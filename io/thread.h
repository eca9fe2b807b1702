/* thread.h - threads with small stacks, because each stack counts in the memory budget, and in
 * address space where that is limited. Every thread of the library is started here. */
#ifndef PERTA_IO_THREAD_H
#define PERTA_IO_THREAD_H

#include <pthread.h>

#if defined __has_feature /* clang */
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define PERTA_STACK_BYTES (1u << 20)
#endif
#elif defined __SANITIZE_ADDRESS__ || defined __SANITIZE_THREAD__
#define PERTA_STACK_BYTES (1u << 20) /* sanitizers put space around everything on the stack */
#endif
/* Encoding needs the deepest stack, 52 KiB. */
#ifndef PERTA_STACK_BYTES
#define PERTA_STACK_BYTES (256u << 10)
#endif

/* As pthread_create. Returns 0 or an errno. */
static inline int perta_thread_start(pthread_t *thread, void *(*run)(void *arg), void *arg)
{
    pthread_attr_t attr;
    int rc = pthread_attr_init(&attr);
    if (rc)
        return rc;
    pthread_attr_setstacksize(&attr, PERTA_STACK_BYTES);
    rc = pthread_create(thread, &attr, run, arg);
    pthread_attr_destroy(&attr);
    return rc;
}

#endif
