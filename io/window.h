/* window.h - the mapped parts of files that this process reads, and the handler for SIGBUS that
 * knows them. Spec: docs/data-path.md
 *
 * Where a mapped file has shrunk or its disk fails, the access raises SIGBUS, on whatever thread it
 * is made. Within a window the handler puts a page of zeros there and notes the address; the access
 * goes on, and what comes of it is thrown away. (systemd's journal does the same.) Every other
 * SIGBUS is the host program's: what was done about it before is done. */
#ifndef PERTA_IO_WINDOW_H
#define PERTA_IO_WINDOW_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

struct perta_window;

/* Between these two, which may nest and come from any thread, the handler is installed. The last
 * close puts back what stood there, unless the host program has installed another since.
 * A bus error while the signal is blocked ends the process, so it is let through on the calling
 * thread, and on those that it makes, until the same thread has closed as often as it opened. */
void perta_windows_open(void);
void perta_windows_close(void);

/* The pages of len_bytes from map on are a window. The address of the first byte of it that could
 * not be read is put into *lost, unless that holds one already; borrowed until the window is
 * removed, which must be before it is unmapped. NULL when out of memory. */
struct perta_window *perta_window_add(const void *map, size_t len_bytes, atomic_uintptr_t *lost);
void perta_window_remove(struct perta_window *window); /* NULL is allowed */

#endif
