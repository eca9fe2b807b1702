/* How many CPUs this process may use: its affinity mask, and quotas in made-up trees of cgroups. */
#include "tests/scratch.h"

#include <sched.h>
#include <sys/stat.h>

#include "stream/cpus.h"
#include "stream/stream.h"

START_TEST(a_quota_is_rounded_up_to_whole_cpus)
{
    static const struct {
        const char *text;
        unsigned n;
    } cases[] = {
        {"max 100000\n", 0},
        {"100000 100000\n", 1},
        {"100001 100000", 2},
        {"150000 100000\n", 2},
        {"1000 100000\n", 1},
        {"6400000 100000\n", 64},
        {"-1 100000", 0},
        {"0 100000", 0},
        {"100000 0", 0},
        {"100000 -1", 0},
        {"100000", 0},
        {"", 0},
        {"100000 100000 1", 0},
        {"1 x", 0},
        {"99999999999999999999999 1", UINT32_MAX},
        {"4294967295 1", UINT32_MAX},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        ck_assert_msg(perta_cpus_of_quota(cases[i].text) == cases[i].n, "%s", cases[i].text);
}
END_TEST

START_TEST(a_cgroup_is_told_by_its_controllers)
{
    char path[PERTA_CGROUP_PATH_MAX];
    ck_assert(perta_cgroup_line("0::/a/b:c\n", true, path));
    ck_assert_str_eq(path, "/a/b:c");
    ck_assert(perta_cgroup_line("3:cpuacct,cpu:/d\n", false, path));
    ck_assert_str_eq(path, "/d");
    ck_assert(!perta_cgroup_line("0::/a\n", false, path));
    ck_assert(!perta_cgroup_line("3:cpu:/d\n", true, path));
    ck_assert(!perta_cgroup_line("3:cpuset,cpuacct:/d\n", false, path));
    ck_assert(!perta_cgroup_line("0::a", true, path));
    ck_assert(!perta_cgroup_line("0:", true, path));
    ck_assert(!perta_cgroup_line("", true, path));
}
END_TEST

#define V2_MOUNT "41 31 0:38 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"

START_TEST(a_mount_is_told_by_its_type)
{
    char root[PERTA_CGROUP_PATH_MAX], mount[PERTA_CGROUP_PATH_MAX];
    ck_assert(perta_cgroup_mount_line(
        "41 31 0:38 /a\\040b /x\\134y rw shared:1 master:2 - cgroup2 c rw", true, root, mount));
    ck_assert_str_eq(root, "/a b");
    ck_assert_str_eq(mount, "/x\\y");
    ck_assert(perta_cgroup_mount_line("32 31 0:29 / /c rw - cgroup c rw,cpuacct,cpu\n", false, root,
                                      mount));
    ck_assert_str_eq(mount, "/c");
    ck_assert(!perta_cgroup_mount_line(V2_MOUNT, false, root, mount));
    ck_assert(
        !perta_cgroup_mount_line("32 31 0:29 / /c rw - cgroup c rw,cpuset\n", false, root, mount));
    ck_assert(!perta_cgroup_mount_line("32 31 0:29 / /c rw - cgroup c rw,cpu", true, root, mount));
    ck_assert(!perta_cgroup_mount_line("32 31 0:29 / /c rw cgroup2", true, root, mount));
    ck_assert(!perta_cgroup_mount_line("32 31 0:29", true, root, mount));
    ck_assert(!perta_cgroup_mount_line("", true, root, mount));
}
END_TEST

/* Create a file below root, with its parent folders. */
static void put_below(const char *path, const char *text)
{
    char name[256];
    snprintf(name, sizeof name, "root%s", path);
    for (char *at = name; (at = strchr(at, '/')); at++) {
        *at = 0;
        mkdir(name, 0755);
        *at = '/';
    }
    put_text(name, text);
}

START_TEST(the_smallest_quota_up_to_the_mount_counts)
{
    ck_assert_uint_eq(perta_cpus_of_cgroups("nowhere"), 0);
    put_below("/proc/self/cgroup", "0::/a/b/c\n");
    put_below("/proc/self/mountinfo", "22 1 8:1 / / rw - ext4 /dev/x rw\n" V2_MOUNT);
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 0);
    put_below("/sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n");
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 0);
    put_below("/sys/fs/cgroup/cpu.max", "700000 100000\n");
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 7);
    put_below("/sys/fs/cgroup/a/cpu.max", "250000 100000\n");
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 3);
    put_below("/sys/fs/cgroup/a/b/c/cpu.max", "50000 100000\n");
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 1);
    put_below("/sys/fs/cpu.max", "1 100000\n"); /* above the mount point */
    put_below("/sys/fs/cgroup/a/b/c/cpu.max", "max 100000\n");
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 3);
}
END_TEST

START_TEST(a_container_sees_its_own_cgroup_at_the_mount)
{
    static const char *const paths[] = {"0::/docker/1234\n", "0::/docker/1234/below\n",
                                        "0::/another\n", "0::/../outside\n"};
    put_below("/proc/self/mountinfo",
              "41 31 0:38 /docker/1234 /sys/fs/cgroup ro - cgroup2 cgroup rw\n");
    put_below("/sys/fs/cgroup/cpu.max", "200000 100000\n");
    for (size_t i = 0; i < sizeof paths / sizeof *paths; i++) {
        put_below("/proc/self/cgroup", paths[i]);
        ck_assert_msg(perta_cpus_of_cgroups("root") == 2, "%s", paths[i]);
    }
}
END_TEST

START_TEST(version_1_has_quota_and_period_in_two_files)
{
    put_below("/proc/self/cgroup", "5:cpuset:/x\n3:cpu,cpuacct:/a\n0::/\n");
    put_below("/proc/self/mountinfo", "32 31 0:29 / /c/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
                                      "41 31 0:38 / /c/unified rw - cgroup2 cgroup2 rw\n");
    put_below("/c/cpu/cpu.cfs_quota_us", "-1\n");
    put_below("/c/cpu/cpu.cfs_period_us", "100000\n");
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 0);
    put_below("/c/cpu/a/cpu.cfs_quota_us", "400000\n");
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 0);
    put_below("/c/cpu/a/cpu.cfs_period_us", "100000\n");
    ck_assert_uint_eq(perta_cpus_of_cgroups("root"), 4);
}
END_TEST

START_TEST(a_process_bound_to_one_cpu_has_one)
{
    cpu_set_t all, one;
    ck_assert_int_eq(sched_getaffinity(0, sizeof all, &all), 0);
    ck_assert_uint_eq(perta_cpus_of_affinity(), (unsigned)CPU_COUNT(&all));
    size_t cpu = 0;
    while (!CPU_ISSET(cpu, &all))
        cpu++;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    ck_assert_int_eq(sched_setaffinity(0, sizeof one, &one), 0);
    ck_assert_uint_eq(perta_cpus_of_affinity(), 1);
    ck_assert_uint_eq(perta_cpus_available(), 1);
    ck_assert_uint_eq(perta_run_threads(&(struct perta_run){.n_threads = 0}), 1);
    ck_assert_uint_eq(perta_run_threads(&(struct perta_run){.n_threads = 5}), 5);
    ck_assert_int_eq(sched_setaffinity(0, sizeof all, &all), 0);
    ck_assert_uint_eq(perta_cpus_available(), 1); /* the same result at every call */
}
END_TEST

int main(void)
{
    TCase *tests = tcase_create("cpus");
    tcase_add_checked_fixture(tests, enter, leave);
    tcase_add_test(tests, a_quota_is_rounded_up_to_whole_cpus);
    tcase_add_test(tests, a_cgroup_is_told_by_its_controllers);
    tcase_add_test(tests, a_mount_is_told_by_its_type);
    tcase_add_test(tests, the_smallest_quota_up_to_the_mount_counts);
    tcase_add_test(tests, a_container_sees_its_own_cgroup_at_the_mount);
    tcase_add_test(tests, version_1_has_quota_and_period_in_two_files);
    tcase_add_test(tests, a_process_bound_to_one_cpu_has_one);
    return run_suite("cpus", tests);
}
