/* Preloaded into a process, this makes it a machine of its own on a disk that keeps locks to each machine (`apart`), and
   makes its clock jump (`clock`). Each acts while a file of that name is in the folder that INTERPOSE names. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static int switched_on(const char *name) {
    char path[4096];
    const char *folder = getenv("INTERPOSE");
    return folder && snprintf(path, sizeof path, "%s/%s", folder, name) < (int)sizeof path && !access(path, F_OK);
}

int flock(int descriptor, int operation) {
    return switched_on("apart") ? 0 : (int)syscall(SYS_flock, descriptor, operation);
}

int gethostname(char *name, size_t length) {
    int (*real)(char *, size_t) = (int (*)(char *, size_t))dlsym(RTLD_NEXT, "gethostname");
    if (!switched_on("apart"))
        return real(name, length);
    snprintf(name, length, "machine-%d", (int)getpid());
    return 0;
}

/* From -12 to 12 hours, different at each call. */
static time_t jump(void) {
    static unsigned calls;
    return switched_on("clock") ? ((time_t)(calls++ * 7 % 25) - 12) * 3600 : 0;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = (int)syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE))
        now->tv_sec += jump();
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = (int)syscall(SYS_gettimeofday, now, zone);
    now->tv_sec += jump();
    return failed;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result)
        *result = now.tv_sec;
    return now.tv_sec;
}
