/* cpus.h - how many CPUs this process may use: those in its affinity mask, but no more than the
 * quota of its control groups. */
#ifndef PERTA_STREAM_CPUS_H
#define PERTA_STREAM_CPUS_H

#include <stdbool.h>
#include <stddef.h>

#include "io/err.h"

/* At least 1. Determined once per process. Any thread may call it. */
PERTA_API unsigned perta_cpus_available(void);

/* The parts of it, for tests. root is prepended to /proc and to the mount points; "" for the real
 * system. */

/* CPUs in this thread's affinity mask; 0 if it cannot be read. */
PERTA_API unsigned perta_cpus_of_affinity(void);
/* The smallest quota of the process's cgroup and those above it, in version 1 and 2; 0: none. */
PERTA_API unsigned perta_cpus_of_cgroups(const char *root);

enum { PERTA_CGROUP_PATH_MAX = 4096 };

/* Parse the text of cpu.max, "QUOTA PERIOD" in microseconds, into CPUs, rounded up; 0: no quota. */
PERTA_API unsigned perta_cpus_of_quota(const char *text);
/* Parse a line of /proc/self/cgroup. True if it is for version 2, or for version 1's controller
 * "cpu"; then path (PERTA_CGROUP_PATH_MAX) is the cgroup's. */
PERTA_API bool perta_cgroup_line(const char *line, bool v2, char *path);
/* Parse a line of /proc/self/mountinfo. True if it mounts such a hierarchy; then root is the cgroup
 * that is visible at the mount point, mount (both PERTA_CGROUP_PATH_MAX). */
PERTA_API bool perta_cgroup_mount_line(const char *line, bool v2, char *root, char *mount);

#endif
