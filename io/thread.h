/* thread.h - threads with small stacks, which count where address space is limited. */
#ifndef PERTA_IO_THREAD_H
#define PERTA_IO_THREAD_H

#include <pthread.h>

#define PERTA_STACK_BYTES (1u << 20)

/* As pthread_create; 0 or an errno. */
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
