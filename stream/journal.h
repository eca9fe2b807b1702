/* journal.h - what a run leaves behind so that another can go on with it after a kill, a power
 * cut or a full disk. Spec: docs/resume.md
 *
 * A file of records beside the output folder that is published last: FOLDER.perta-journal. Each
 * line is the XXH3-64 of a text in hexadecimal, a blank, and that text: a JSON object. A line that
 * was not written whole does not count, nor does what follows it. The first record is the run's
 * identity, whatever decides the bytes of the result, and when it began. Every other record says
 * how far the outputs are on disk: they are synced before it is appended, and it is synced too. The
 * last says that they are complete and how their folders are known by inode, so that a run that was
 * killed while it gave them their names is finished by the next. */
#ifndef PERTA_STREAM_JOURNAL_H
#define PERTA_STREAM_JOURNAL_H

#include <jansson.h>
#include <stdbool.h>

#include "io/format/checkpoint.h"
#include "io/hash.h"
#include "io/publish/publish.h"

#define PERTA_JOURNAL_SUFFIX ".perta-journal"

/* Commit when so much time has gone by or so much has been written since the last time. Variables
 * of the environment of these names stand in for them: see docs/resume.md. */
#define PERTA_COMMIT_SECONDS 10
#define PERTA_COMMIT_BYTES (4ull << 30)

struct perta_journal {
    char *path;
    int fd;           /* locked while open */
    bool resume;      /* the run may go on with what another left */
    bool resuming;    /* and it does */
    bool committed;   /* there is something to go on with */
    double last_time; /* of a commit, in seconds */
    int64_t started;  /* when the run began, its first part if it goes on; Unix time */
    uint64_t bytes;   /* written until then */
    json_t *last;     /* record, when it was opened; NULL: a new journal */
};

/* Is there a journal to go on with, beside the output at path? */
bool perta_journal_found(const char *path);

/* Open the journal beside the output at path, before the output itself is touched: a run owns what
 * it has the journal of. With resume, and one there: to go on; PERTA_EUSAGE if identity (borrowed;
 * NULL: no memory) is not the one that it began with, naming what changed. Else a new one;
 * PERTA_EUSAGE if one is there, unless force or resume. PERTA_EUSAGE too if another process has
 * it. Closed with perta_journal_close, on error too. */
int perta_journal_open(struct perta_journal *journal, const char *path, const json_t *identity,
                       bool resume, bool force, struct perta_err *err);
/* Then each output: perta_publish_begin, or perta_publish_resume with what is left of it. It may
 * be gone only where it may have its name already. */
int perta_journal_folder(const struct perta_journal *journal, struct perta_publish *folder,
                         const char *path, const char *like, bool force, struct perta_err *err);
/* All records that a run left, but the first, in order, to use(ctx, record, err); it may keep
 * record (json_incref). */
typedef int (*perta_journal_use)(void *ctx, json_t *record, struct perta_err *err);
int perta_journal_replay(const struct perta_journal *journal, perta_journal_use use, void *ctx,
                         struct perta_err *err);
/* The last record when the journal was opened; NULL: a new journal. Borrowed. */
const json_t *perta_journal_last(const struct perta_journal *journal);
/* Is it time? bytes: written so far, by the caller's count. */
bool perta_journal_due(const struct perta_journal *journal, uint64_t bytes);
/* Append record (borrowed) and sync it: the outputs, synced before, are as it says. */
int perta_journal_commit(struct perta_journal *journal, const json_t *record, uint64_t bytes,
                         struct perta_err *err);
/* Folders (n) are complete but for their names: sync them and say so in the journal; from then on
 * nothing else is needed. summary (borrowed; NULL: a part of it was lost without memory, which fails
 * here, before anything has its name) is told when the run began and kept there, for the run that
 * may have to go on. */
int perta_journal_complete(struct perta_journal *journal, struct perta_publish *const *folders,
                           size_t n, json_t *summary, struct perta_err *err);
/* The same, unless it has been done; then give them their names, in order, and remove the
 * journal. With a journal whose last record is that of an earlier publish: finish what that
 * began. */
int perta_journal_publish(struct perta_journal *journal, struct perta_publish *const *folders,
                          size_t n, json_t *summary, struct perta_err *err);
/* Had an earlier run got as far as that? */
bool perta_journal_is_publishing(const struct perta_journal *journal);
/* The summary that it kept; the caller's. */
json_t *perta_journal_summary(const struct perta_journal *journal);
/* After an error of code rc: with something committed, and unless the input is bad, the folders
 * (n) are kept for --resume; else the journal is removed. */
void perta_journal_abandon(struct perta_journal *journal, struct perta_publish *const *folders,
                           size_t n, int rc, struct perta_err *err);
/* Close; the file stays. Zeroed is fine. */
void perta_journal_close(struct perta_journal *journal);

/* Bytes in a record, in hexadecimal. json is the caller's; NULL without memory. get: false if
 * there are not n bytes. */
json_t *perta_blob_json(const void *data, size_t n);
bool perta_blob_get(const json_t *blob, void *data, size_t n);
/* How many bytes there are. */
size_t perta_blob_bytes(const json_t *blob);
/* A digest's state. get: into a new digest of the same kind. */
json_t *perta_blob_of_digest(const struct perta_digest *digest);
bool perta_blob_get_digest(const json_t *blob, struct perta_digest *digest);

/* For identities: what a file is, by size and time of change; and the files of a checkpoint, by
 * name too. The caller's; NULL without memory. */
json_t *perta_journal_file(uint64_t len_bytes, const struct timespec *mtime);
json_t *perta_journal_checkpoint(const struct perta_checkpoint *ck);
/* A hash of its config.json. */
json_t *perta_journal_config(const struct perta_checkpoint *ck);
/* Of a checkpoint that is the run's own, which it has written on the way and will not change: it
 * may have got other times by a power cut. By name and size. */
json_t *perta_journal_own(const struct perta_checkpoint *ck);

#endif
