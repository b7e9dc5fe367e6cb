/* errno after access(2), of two threads at once: each prints path, result and errno, of its own. */
#include <errno.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static char too_long[PATH_MAX + 10];

static void *asks(void *paths) {
    for (const char **path = paths; *path; path++) {
        errno = 77;
        int result = access(*path, F_OK);
        int number = errno;
        printf("%.64s %d %d\n", *path, result, number);
        fflush(stdout);
    }
    return NULL;
}

int main(void) {
    memset(too_long, 'x', sizeof too_long - 1);
    const char *first[] = {"/nonexistent", "/", NULL}, *second[] = {"/dev/null/x", too_long, "/dev", NULL};
    pthread_t thread;
    asks(first);
    if (pthread_create(&thread, NULL, asks, second))
        return 1;
    return pthread_join(thread, NULL);
}
