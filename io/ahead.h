/* ahead.h - a write-ahead log: bytes that are to stand in files which exist are on disk in the
 * log before they are written there, so that a kill or a power cut at any instant leaves files
 * that the log makes whole. Spec: docs/resume.md, In place.
 *
 * The log is a file in the folder of the files. Bytes gather in one buffer, a batch; a full batch
 * is written to the log and synced, then to the files and synced. One batch stands in the log at
 * a time, written over the one before it, whose bytes are in the files for good by then.
 * Owns: the log and its buffer; files are the caller's. Threads: one owner. */
#ifndef PERTA_IO_AHEAD_H
#define PERTA_IO_AHEAD_H

#include <stdbool.h>

#include "io/file.h"

#define PERTA_AHEAD_NAME "perta-in-place.journal"
/* Whose edit it is: the digest of what it follows, and the path of that, for messages. */
#define PERTA_AHEAD_ID_BYTES 64
#define PERTA_AHEAD_PATH_MAX 3072

struct perta_ahead_extent {
    uint32_t file;
    uint32_t zero;
    uint64_t off_bytes; /* a multiple of PERTA_BLOCK_BYTES */
    uint64_t len_bytes;
};

struct perta_ahead {
    char *path, *partial;     /* partial: what it is called while it is made */
    struct perta_file log;    /* .path NULL: not begun */
    bool going_on;            /* the log was there */
    struct perta_file *files; /* (n_files), borrowed: open to write, direct where they can */
    int *plain;               /* (n_files): the same through the page cache, for odd ends */
    uint32_t n_files;
    uint8_t *buf;                    /* head and table of the batch, then its bytes */
    uint64_t room_bytes, used_bytes; /* of the bytes */
    struct perta_ahead_extent *extents;
    uint32_t n_extents;
    uint64_t written_bytes; /* to the files */
};

/* The log of folder; files (n) are opened by the caller before anything is put. The largest put
 * must fit room_bytes with two blocks to spare. Where a log is there already, its last batch is
 * written to the files again, if it is whole; one of another edit (id, ID_BYTES characters) is
 * PERTA_EUSAGE. Nothing is written where there is none. Close it on error too. */
int perta_ahead_open(struct perta_ahead *ahead, const char *folder, const char *id,
                     struct perta_file *files, uint32_t n_files, uint64_t room_bytes,
                     struct perta_err *err);
/* Before the first put, unless going_on: make the log, with room for a batch on disk. subject: the
 * path of what the edit follows. */
int perta_ahead_begin(struct perta_ahead *ahead, const char *id, const char *subject,
                      struct perta_err *err);
/* len bytes at off of a file will be data. Offsets of one file grow. */
int perta_ahead_put(struct perta_ahead *ahead, uint32_t file, uint64_t off_bytes, const void *data,
                    uint64_t len_bytes, struct perta_err *err);
/* All that was put is in the files and synced: remove the log. */
int perta_ahead_finish(struct perta_ahead *ahead, struct perta_err *err);
/* The log stays as it is. Zeroed is fine. */
void perta_ahead_close(struct perta_ahead *ahead);

/* Is there a log in the folder? */
bool perta_ahead_found(const char *folder);
/* Then the files in it are neither what they were nor what they
 * will be: PERTA_EINPUT, with the commands that lead on and back. */
int perta_ahead_refuse(const char *folder, struct perta_err *err);

#endif
