/* window.h - the mapped parts of files that this process reads, and the SIGBUS handler that knows
 * them. Spec: docs/data-path.md
 *
 * If a mapped file has shrunk or its disk fails, the access raises SIGBUS on the thread that makes
 * it. For an address in a window, the handler maps a page of zeros there and notes the address. The
 * access then continues, and whatever is computed from it is discarded. (systemd's journal does the
 * same.) Every other SIGBUS belongs to the host program and is handled as it was before. */
#ifndef PERTA_IO_WINDOW_H
#define PERTA_IO_WINDOW_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

struct perta_window;

/* The handler is installed between these two calls, which may nest and come from any thread. The
 * last close restores the previous handler, unless the host program has installed another one
 * since. A bus error while SIGBUS is blocked kills the process. So the signal is unblocked on the
 * calling thread, and on threads that it starts, until that thread has closed as often as it
 * opened. */
void perta_windows_open(void);
void perta_windows_close(void);

/* Register the pages of len_bytes from map on as a window. The handler stores the address of the
 * first byte that could not be read in *lost, unless that holds one already. lost is borrowed until
 * the window is removed, which must happen before it is unmapped. NULL only when out of memory. */
struct perta_window *perta_window_add(const void *map, size_t len_bytes, atomic_uintptr_t *lost);
void perta_window_remove(struct perta_window *window); /* NULL is allowed */

#endif
