/* cpus.h - how many CPUs this process may use: what the scheduler lets it run on, and no more than
 * its control groups' quota. */
#ifndef PERTA_STREAM_CPUS_H
#define PERTA_STREAM_CPUS_H

#include <stdbool.h>
#include <stddef.h>

#include "io/err.h"

/* At least 1. Asked for once: the same at every call of a process. From any thread. */
PERTA_API unsigned perta_cpus_available(void);

/* The parts, for tests. root is put before /proc and the mount points: "" is the system. */

/* CPUs in this thread's affinity mask; 0 where it cannot be read. */
PERTA_API unsigned perta_cpus_of_affinity(void);
/* The smallest quota of the process's cgroup and of those above it, version 1 and 2; 0: none. */
PERTA_API unsigned perta_cpus_of_cgroups(const char *root);

enum { PERTA_CGROUP_PATH_MAX = 4096 };

/* The text of cpu.max, "QUOTA PERIOD" in microseconds, in CPUs, rounded up; 0: no quota. */
PERTA_API unsigned perta_cpus_of_quota(const char *text);
/* A line of /proc/self/cgroup: true if it is of version 2, or of version 1's controller "cpu".
 * Then path (PERTA_CGROUP_PATH_MAX) is the cgroup's. */
PERTA_API bool perta_cgroup_line(const char *line, bool v2, char *path);
/* A line of /proc/self/mountinfo: true if it mounts such a hierarchy. Then root is the cgroup that
 * is seen at the mount point, mount (both PERTA_CGROUP_PATH_MAX). */
PERTA_API bool perta_cgroup_mount_line(const char *line, bool v2, char *root, char *mount);

#endif
