/* file.h - files that the engines read or write, with O_DIRECT where the file system supports it;
 * and the small functions on files that the rest of the library shares. */
#ifndef PERTA_IO_FILE_H
#define PERTA_IO_FILE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>

#include "io/err.h"

/* Offsets, lengths and memory addresses of direct I/O are multiples of this. */
#define PERTA_BLOCK_BYTES UINT64_C(4096)

struct perta_file {
    char *path;
    int fd;      /* -1 while closed */
    bool direct; /* transfers are whole blocks, even if O_DIRECT was switched off */
    uint64_t len_bytes;
    uint64_t dev, ino;
    struct timespec mtime;
};

/* As open(2), for paths that may name anything. It does not wait for the other end of a FIFO, and a
 * terminal does not become the process's own. A regular file is not left non-blocking, because some
 * kernels then keep returning EAGAIN for direct reads. Adds O_CLOEXEC; mode 0666. */
int perta_open_any(const char *path, int flags);

/* Open a regular file for reading and stat it. A FIFO is refused without waiting for it. Returns
 * the file descriptor, or PERTA_E*. */
int perta_open_regular(const char *path, struct stat *st, struct perta_err *err);

/* Open a regular file for reading, with O_DIRECT if wanted and possible, else through the page
 * cache. The caller closes it, on error too. */
PERTA_API int perta_file_open(struct perta_file *file, const char *path, bool want_direct,
                              struct perta_err *err);
/* The same, but create the file, which must not exist yet. */
PERTA_API int perta_file_create(struct perta_file *file, const char *path, bool want_direct,
                                struct perta_err *err);
/* The same, but open an existing regular file for writing. A symbolic link is an error. */
int perta_file_reopen(struct perta_file *file, const char *path, bool want_direct,
                      struct perta_err *err);
/* Check a file that an earlier run left before this one writes to it: PERTA_EINPUT unless it is
 * regular and has no other name (a hard link), which might belong to somebody else's file. */
int perta_check_left(int fd, const char *path, struct stat *st, struct perta_err *err);
/* PERTA_EINPUT if device, inode, size or modification time changed since the file was opened. */
PERTA_API int perta_file_unchanged(const struct perta_file *file, struct perta_err *err);
/* A zeroed or closed file is allowed. */
PERTA_API void perta_file_close(struct perta_file *file);

/* Can this file be read with O_DIRECT in blocks of PERTA_BLOCK_BYTES? Reads one block to find
 * out. */
PERTA_API bool perta_file_can_direct(const char *path);
/* Share of the file's pages that are in the page cache, 0 to 1, from a sample. -1 if it is unknown:
 * the kernel does not tell about files that the user neither owns nor may write. */
PERTA_API double perta_file_cached_share(const char *path);

/* dir/name; the caller frees it. NULL only when out of memory. */
PERTA_API char *perta_path_join(const char *dir, const char *name);
/* stat(2) of a path that the user gave: PERTA_EINPUT if nothing is there. */
int perta_path_stat(const char *path, struct stat *st, struct perta_err *err);
/* Call each(ctx, name, err) for every name in the folder but "." and "..", in any order, until it
 * returns other than 0. Returns that, or PERTA_ESYS. */
int perta_folder_each(const char *path,
                      int (*each)(void *ctx, const char *name, struct perta_err *err), void *ctx,
                      struct perta_err *err);

/* State of a retry loop: failures since the last transfer that moved bytes. */
struct perta_retry {
    unsigned n_again; /* EAGAIN in a row */
    bool buffered;    /* O_DIRECT was switched off */
};
/* Should a transfer that failed with this error be repeated? Always after EINTR. After EAGAIN up to
 * a hundred times in a row, with pauses: some kernels return it for regular files. */
bool perta_retry_same(struct perta_retry *retry, int error);
/* The same, and once after EINVAL: some file systems accept O_DIRECT at open and refuse the
 * transfer. O_DIRECT is then switched off for fd (and everything that shares its open file), and
 * the rest goes through the page cache. */
bool perta_retry_any(struct perta_retry *retry, int fd, int error);
/* Switch O_DIRECT off for fd. False if that fails. */
bool perta_fd_buffer(int fd);

/* Read the whole regular file at path into *text, which the caller frees, on error too. */
int perta_file_text(const char *path, char **text, size_t *len_bytes, struct perta_err *err);
/* Read the whole range with plain preads. PERTA_EINPUT if the file is shorter. fd may be open with
 * O_DIRECT if buffer and range are whole blocks; see perta_retry_any. */
PERTA_API int perta_pread_all(int fd, void *buf, uint64_t len_bytes, uint64_t off_bytes,
                              const char *path, struct perta_err *err);
/* Write the whole buffer at off_bytes. name is for messages. fd as for perta_pread_all. */
PERTA_API int perta_pwrite_all(int fd, const void *buf, uint64_t len_bytes, uint64_t off_bytes,
                               const char *name, struct perta_err *err);
/* Write the whole buffer to fd at its current position. */
PERTA_API int perta_write_all(int fd, const void *buf, uint64_t len_bytes, const char *path,
                              struct perta_err *err);

/* Suffix of outputs that are not complete yet. */
#define PERTA_PARTIAL_SUFFIX ".perta-partial"

/* fsync the folder at path; or the folder that path is in, so that a name that was added or removed
 * there survives a power cut. */
int perta_folder_sync(const char *path, struct perta_err *err);
int perta_name_sync(const char *path, struct perta_err *err);

#endif
