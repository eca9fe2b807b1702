/* wal.h - a write-ahead log for files that are changed in place. New bytes are on disk in the log
 * before they are written to the files. After a kill or a power cut at any instant, replaying the
 * log makes the files whole again. Spec: docs/resume.md, In place.
 *
 * The log is a file in the same folder. Bytes gather in one buffer, a batch. A full batch is
 * written to the log and synced, then written to the files and synced. The log holds one batch at a
 * time: each overwrites the one before it, whose bytes are in the files by then.
 *
 * Owns: the log and its buffer. The files are the caller's. Threads: one owner. */
#ifndef PERTA_IO_WAL_H
#define PERTA_IO_WAL_H

#include <stdbool.h>

#include "io/file.h"

#define PERTA_WAL_NAME "perta-in-place.journal"
/* The log says which edit it belongs to: the digest of the patch's manifest, and the patch's path
 * for messages. */
#define PERTA_WAL_ID_BYTES 64
#define PERTA_WAL_PATH_MAX 3072

struct perta_wal_extent {
    uint32_t file;
    uint32_t zero;
    uint64_t off_bytes; /* a multiple of PERTA_BLOCK_BYTES */
    uint64_t len_bytes;
};

struct perta_wal {
    char *path, *partial;     /* partial: the log's name until it is complete */
    struct perta_file log;    /* .path NULL: there is no log yet */
    bool resuming;            /* an earlier run left the log */
    struct perta_file *files; /* (n_files), borrowed; open for writing, O_DIRECT where possible */
    int *plain;               /* (n_files): the same without O_DIRECT, for partial blocks */
    uint32_t n_files;
    uint8_t *buf;                    /* the batch: header and table, then its bytes */
    uint64_t room_bytes, used_bytes; /* of the batch's bytes */
    struct perta_wal_extent *extents;
    uint32_t n_extents;
    uint64_t written_bytes; /* to the files so far */
};

/* Prepare the log of an edit of the files (n) in folder. The caller has opened the files. No put
 * may be larger than room_bytes less two blocks. If an earlier run left a log, its last batch, if
 * complete, is written to the files again; a log of another edit (id, PERTA_WAL_ID_BYTES
 * characters) is PERTA_EUSAGE. Without a log, nothing is written. Close it on error too. */
int perta_wal_open(struct perta_wal *wal, const char *folder, const char *id,
                   struct perta_file *files, uint32_t n_files, uint64_t room_bytes,
                   struct perta_err *err);
/* Create the log and reserve disk space for a batch. Call it before the first put, unless the edit
 * is being resumed. subject: path of the patch. */
int perta_wal_begin(struct perta_wal *wal, const char *id, const char *subject,
                    struct perta_err *err);
/* Write data (len_bytes) at off_bytes of a file. Offsets within one file must increase. */
int perta_wal_put(struct perta_wal *wal, uint32_t file, uint64_t off_bytes, const void *data,
                  uint64_t len_bytes, struct perta_err *err);
/* Flush the last batch to the files, sync them, and remove the log. */
int perta_wal_finish(struct perta_wal *wal, struct perta_err *err);
/* Free the memory and close the files; a log on disk stays. A zeroed struct is allowed. */
void perta_wal_close(struct perta_wal *wal);

/* Does the folder hold a log? */
bool perta_wal_found(const char *folder);
/* If so, its files are neither the old ones nor the new ones: PERTA_EINPUT, with the commands that
 * complete or revert the edit. 0 without a log. */
int perta_wal_refuse(const char *folder, struct perta_err *err);

#endif
