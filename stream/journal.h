/* journal.h - the journal, with which a later run resumes after a kill, a power cut or a full disk.
 * Spec: docs/resume.md
 *
 * The journal is a file of records beside the output folder that is published last:
 * FOLDER.perta-journal. Each line is the XXH3-64 of a text in hexadecimal, a blank, and that text,
 * a JSON object. A line that is not complete does not count, nor does anything after it. The first
 * record is the run's identity (everything that decides the bytes of the result) and when the run
 * started. Every other record is a commit point: it says how far the outputs are on disk. The
 * outputs are synced before it is appended, and then it is synced too. The last record, publish,
 * says that the outputs are complete, with the inodes of their folders, so that a later run can
 * finish the renames. */
#ifndef PERTA_STREAM_JOURNAL_H
#define PERTA_STREAM_JOURNAL_H

#include <jansson.h>
#include <stdbool.h>

#include "io/format/checkpoint.h"
#include "io/hash.h"
#include "io/publish/publish.h"

#define PERTA_JOURNAL_SUFFIX ".perta-journal"

/* A commit point is due after this much time, or after this many bytes written, since the last one.
 * Environment variables of these names override them: see docs/resume.md. */
#define PERTA_COMMIT_SECONDS 10
#define PERTA_COMMIT_BYTES (4ull << 30)

struct perta_journal {
    char *path;
    int fd;           /* locked while open */
    bool resume;      /* the run was asked to resume (--resume) */
    bool resuming;    /* and there was a run to resume */
    bool keep;        /* perta_journal_abandon keeps what is committed, whatever the error */
    bool committed;   /* there is a commit point to resume from */
    double last_time; /* time of the last commit point, in seconds */
    int64_t started;  /* when the run started; if resumed, when its first part did. Unix time */
    uint64_t bytes;   /* bytes written up to that commit point */
    json_t *last;     /* last record when it was opened, or publish since; or NULL */
};

/* Is there a journal to resume from, beside the output at path? */
bool perta_journal_found(const char *path);

/* Open the journal beside the output at path, before touching the output itself: whoever holds the
 * journal owns the output. identity is borrowed; NULL means that memory ran out.
 *
 * With resume and a journal: resume it. PERTA_EUSAGE, naming what changed, if identity is not the
 * one that it was started with. Otherwise a new journal is started; PERTA_EUSAGE if there is one
 * already, unless force or resume is set. PERTA_EUSAGE too if another process holds it. Close it
 * with perta_journal_close, on error too. */
int perta_journal_open(struct perta_journal *journal, const char *path, const json_t *identity,
                       bool resume, bool force, struct perta_err *err);
/* Begin each output next: perta_publish_begin, or perta_publish_resume with the partial folder that
 * was left. That may be missing only if the output may have been renamed already. */
int perta_journal_folder(const struct perta_journal *journal, struct perta_publish *folder,
                         const char *path, const char *like, bool force, struct perta_err *err);
/* Call use(ctx, record, err) for every record but the first, in order. use may keep record
 * (json_incref). */
typedef int (*perta_journal_use)(void *ctx, json_t *record, struct perta_err *err);
int perta_journal_replay(const struct perta_journal *journal, perta_journal_use use, void *ctx,
                         struct perta_err *err);
/* The last record when the journal was opened, or the publish record that was appended since; NULL
 * for a new journal. Borrowed. */
const json_t *perta_journal_last(const struct perta_journal *journal);
/* Is a commit point due? bytes: written so far, by the caller's count. */
bool perta_journal_due(const struct perta_journal *journal, uint64_t bytes);
/* Make a commit point: append record (borrowed), and sync it. The outputs must be synced before. */
int perta_journal_commit(struct perta_journal *journal, const json_t *record, uint64_t bytes,
                         struct perta_err *err);
/* The folders (n) are complete; only the renames remain. Sync them and append the publish record.
 * From then on nothing else is needed. summary is borrowed and gets `started`; it is kept in the
 * record for the run that may have to finish. NULL means that a part of it was lost because memory
 * ran out: that fails here, before anything is renamed. */
int perta_journal_complete(struct perta_journal *journal, struct perta_publish *const *folders,
                           size_t n, json_t *summary, struct perta_err *err);
/* The same, unless it was done already; then rename the folders, in order, and remove the journal.
 * If the journal ends with the publish record of an earlier run, finish what that run began. */
int perta_journal_publish(struct perta_journal *journal, struct perta_publish *const *folders,
                          size_t n, json_t *summary, struct perta_err *err);
/* Does the journal end with the publish record? */
bool perta_journal_is_publishing(const struct perta_journal *journal);
/* The summary in that record; the caller's. */
json_t *perta_journal_summary(const struct perta_journal *journal);
/* The run ends without outputs: remove the journal. Nothing can be resumed any more. */
int perta_journal_remove(struct perta_journal *journal, struct perta_err *err);
/* After an error with code rc. If there is a commit point, and the error is PERTA_EINTR or
 * PERTA_ESYS, the folders (n) and the journal stay for --resume, and *err says so unless it does
 * already (err->resumable). They stay after other errors too if keep is set. Otherwise the journal
 * is removed. */
void perta_journal_abandon(struct perta_journal *journal, struct perta_publish *const *folders,
                           size_t n, int rc, struct perta_err *err);
/* Close; the file stays. A zeroed struct is allowed. */
void perta_journal_close(struct perta_journal *journal);

/* For identities: a file, by size and modification time; and the files of a checkpoint, by name
 * too. The caller's; NULL only when out of memory. */
json_t *perta_journal_file(uint64_t len_bytes, const struct timespec *mtime);
json_t *perta_journal_checkpoint(const struct perta_checkpoint *ck);
/* A hash of its config.json. */
json_t *perta_journal_config(const struct perta_checkpoint *ck);
/* A checkpoint that the run itself wrote and does not change, by name and size alone: a power cut
 * may have changed its times. */
json_t *perta_journal_own(const struct perta_checkpoint *ck);

#endif
