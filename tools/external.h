/* external.h - verbs that are programs of their own: `perta NAME' runs perta-NAME, as git does. */
#ifndef PERTA_TOOLS_EXTERNAL_H
#define PERTA_TOOLS_EXTERNAL_H

#include <stdbool.h>
#include <stdio.h>

/* Run perta-NAME in place of this process, with the arguments argv[1] to argv[argc - 1]. It is
 * looked for in the folder of the running program, in PATH, and where `make install' puts such
 * programs. Its environment has PERTA, the path of the running program, so that it calls the same
 * build. Returns only if there is no such program, or it could not be run: prints the error, and
 * returns the exit status. */
int external_run(const char *name, int argc, char **argv);

/* Print the names of all such programs, sorted. is_verb says which names the command knows itself;
 * these are left out. Prints nothing if there are none. */
void external_list(FILE *to, bool (*is_verb)(const char *name));

#endif
