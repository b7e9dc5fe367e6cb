/* A small multi-threaded program for `trapline demo` to probe: threads that handle requests, and count them.
   It says READY by making a file, works from SIGUSR1 to SIGTERM, then writes its own count to REPORT, and ends. */
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define THREADS 3

static atomic_int stop;
static atomic_long handled;
static const char *const paths[] = {
    "/", "/cart", "/cart/checkout", "/items/17", "/items/4711?ref=mail", "/login", "/static/logo.svg",
};

/* The function that is probed: its arguments are what a person wants to see. */
__attribute__((noinline)) int handle_request(const char *path, int bytes, int worker) {
    volatile unsigned hash = 2166136261u;
    for (const char *p = path; *p; p++)
        hash = (hash ^ (unsigned char)*p) * 16777619u;
    return (int)(hash % (unsigned)bytes) + worker;
}

static void *work(void *number) {
    unsigned seed = 7 + (unsigned)(size_t)number;
    while (!atomic_load(&stop)) {
        const char *path = paths[rand_r(&seed) % (sizeof paths / sizeof *paths)];
        handle_request(path, 200 + rand_r(&seed) % 9000, (int)(size_t)number);
        atomic_fetch_add(&handled, 1);
        struct timespec pause = {0, 20000000L + rand_r(&seed) % 40000000};
        nanosleep(&pause, NULL);
    }
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t threads[THREADS];
    sigset_t begin, end;
    int number;
    FILE *file;
    if (argc != 3)
        return 2;
    /* Blocked before the threads exist, so that both signals wait for sigwait. */
    sigemptyset(&begin);
    sigaddset(&begin, SIGUSR1);
    sigemptyset(&end);
    sigaddset(&end, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &begin, NULL);
    pthread_sigmask(SIG_BLOCK, &end, NULL);
    if (!(file = fopen(argv[1], "w")) || fclose(file))
        return 1;
    sigwait(&begin, &number);
    for (size_t i = 0; i < THREADS; i++)
        if (pthread_create(&threads[i], NULL, work, (void *)i))
            return 1;
    sigwait(&end, &number);
    atomic_store(&stop, 1);
    for (size_t i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    file = fopen(argv[2], "w");
    if (!file || fprintf(file, "{\"handle_request\": %ld}\n", atomic_load(&handled)) < 0 || fclose(file))
        return 1;
    return 0;
}
