/* file.h - one file that the engine reads or writes, direct where the file system can. */
#ifndef PERTA_IO_FILE_H
#define PERTA_IO_FILE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/stat.h>
#include <time.h>

#include "io/err.h"

/* Direct I/O is done in multiples of this; memory is aligned to it too. */
#define PERTA_BLOCK_BYTES UINT64_C(4096)

struct perta_file {
    char *path;
    int fd;      /* -1 while closed */
    bool direct; /* opened with O_DIRECT: transfers are whole blocks, also after it was refused */
    uint64_t len_bytes;
    uint64_t dev, ino;
    struct timespec mtime;
};

/* As open(2), for files that may be anything: it does not wait for the other end of a FIFO, and no
 * terminal becomes the process's own. A regular file is not left non-blocking: on some kernels
 * direct reads of one then give EAGAIN, again and again. Adds O_CLOEXEC; mode 0666. */
int perta_open_any(const char *path, int flags);

/* Open a regular file to read, and say what it is. A FIFO is refused and does not hang us.
 * Returns the file descriptor, or PERTA_E*. */
int perta_open_regular(const char *path, struct stat *st, struct perta_err *err);

/* Open a regular file to read; direct where wanted and possible, else through the page cache.
 * The caller closes it, on error too. */
PERTA_API int perta_file_open(struct perta_file *file, const char *path, bool want_direct,
                              struct perta_err *err);
/* Create a file that must not exist. */
PERTA_API int perta_file_create(struct perta_file *file, const char *path, bool want_direct,
                                struct perta_err *err);
/* Open a regular file that is there, to write on; not through a link. */
int perta_file_reopen(struct perta_file *file, const char *path, bool want_direct,
                      struct perta_err *err);
/* Of a file that another run left, for this one to write on: PERTA_EINPUT unless it is regular and
 * has no other name (hard link), which might be of somebody else's file. */
int perta_check_left(int fd, const char *path, struct stat *st, struct perta_err *err);
/* PERTA_EINPUT if device, inode, size or modification time are no longer what they were at opening. */
PERTA_API int perta_file_unchanged(const struct perta_file *file, struct perta_err *err);
/* May be called on a zeroed or closed file. */
PERTA_API void perta_file_close(struct perta_file *file);

/* Can files in this folder be read with O_DIRECT in PERTA_BLOCK_BYTES blocks? Looks at one
 * open file. */
PERTA_API bool perta_file_can_direct(const char *path);
/* Share of the file's pages that are in the page cache, 0 to 1, from a sample; -1 where that is not
 * to be found out, as of one that the user neither owns nor may write. */
PERTA_API double perta_file_cached_share(const char *path);

/* dir/name; the caller's (free). NULL without memory. */
PERTA_API char *perta_path_join(const char *dir, const char *name);
/* stat(2) of what a command names: PERTA_EINPUT where nothing is there. */
int perta_path_stat(const char *path, struct stat *st, struct perta_err *err);
/* Every name in the folder at path but "." and ".." to each(ctx, name, err), in any order, until it
 * returns other than 0. */
int perta_folder_each(const char *path,
                      int (*each)(void *ctx, const char *name, struct perta_err *err), void *ctx,
                      struct perta_err *err);

/* What a loop of transfers knows of those that failed since the last one that moved bytes. */
struct perta_retry {
    unsigned n_again; /* EAGAIN in a row */
    bool buffered;    /* O_DIRECT was switched off for it */
};
/* Is a transfer that failed with error to be made again? After EINTR always; after EAGAIN up to a
 * hundred times in a row, with pauses, for some kernels give it for regular files. */
bool perta_retry_same(struct perta_retry *retry, int error);
/* The same, and after EINVAL once: some file systems refuse O_DIRECT as late as here, so it is
 * switched off for fd (and whoever shares its open file), and the rest takes the page cache. */
bool perta_retry_any(struct perta_retry *retry, int fd, int error);
/* Switch O_DIRECT off. False where that is refused. */
bool perta_fd_buffer(int fd);

/* All bytes of the regular file at path; *text is the caller's (free), also where this fails. */
int perta_file_text(const char *path, char **text, size_t *len_bytes, struct perta_err *err);
/* Read the whole range with plain preads; a shorter file is PERTA_EINPUT. fd may be open with
 * O_DIRECT where buffer and range are whole blocks; see perta_retry_any. */
PERTA_API int perta_pread_all(int fd, void *buf, uint64_t len_bytes, uint64_t off_bytes,
                              const char *path, struct perta_err *err);
/* Write the whole buffer at off_bytes; name for messages. fd as for perta_pread_all. */
PERTA_API int perta_pwrite_all(int fd, const void *buf, uint64_t len_bytes, uint64_t off_bytes,
                               const char *name, struct perta_err *err);
/* Write the whole buffer to fd at its position. */
PERTA_API int perta_write_all(int fd, const void *buf, uint64_t len_bytes, const char *path,
                              struct perta_err *err);

/* What is not finished has this after its name. */
#define PERTA_PARTIAL_SUFFIX ".perta-partial"

/* fsync a folder; or the one that path is in: then its name, or that it has gone, outlives a power
 * cut. */
int perta_folder_sync(const char *path, struct perta_err *err);
int perta_name_sync(const char *path, struct perta_err *err);

#endif
