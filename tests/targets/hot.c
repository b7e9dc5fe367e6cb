/* N threads that call a function in a loop.
 *
 *   hot [THREADS]
 *   start | stop       all threads run, or stand still (stop answers when the last call has returned)
 *   call N [TEXT]      the main thread calls N times (i from 0, s = TEXT or "hello"); answers the time it took
 *   callp N ADDR       the same with s = (char *)ADDR, which the function never reads
 *   spawn N            N more threads
 *   six                one call of a function of six arguments: 1 2 3 4 5 "six"
 *   count              begun= done= wrong= threads=
 */
#include "target.h"
#include <pthread.h>

static counter begun, done, wrong, parked;
static _Atomic int running;
static int threads;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

PROBED long target_hot(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	return i * 3 + 1;
}

PROBED long target_six(long a, long b, long c, long d, long e, const char *s)
{
	__asm__ volatile("" ::"r"(s));
	return a + b + c + d + e;
}

static inline void one(long i, const char *s)
{
	atomic_fetch_add(&begun, 1);
	if (target_hot(i, s) != i * 3 + 1)
		atomic_fetch_add(&wrong, 1);
	atomic_fetch_add(&done, 1);
}

static void *worker(void *arg)
{
	char text[32];
	snprintf(text, sizeof text, "thread-%ld", (long)arg);
	for (long i = 0;; i++) {
		while (!atomic_load_explicit(&running, memory_order_acquire)) {
			pthread_mutex_lock(&lock);
			parked++;
			pthread_cond_broadcast(&changed);
			while (!running)
				pthread_cond_wait(&changed, &lock);
			parked--;
			pthread_mutex_unlock(&lock);
		}
		one(i, text);
	}
	return NULL;
}

static void set_running(int value)
{
	pthread_mutex_lock(&lock);
	running = value;
	pthread_cond_broadcast(&changed);
	while (!value && parked < (uint64_t)threads)
		pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
}

static void spawn(int n)
{
	for (int i = 0; i < n; i++) {
		pthread_t t;
		errno = pthread_create(&t, NULL, worker, (void *)(long)threads);
		if (errno)
			die("pthread_create");
		pthread_detach(t);
		threads++;
	}
	if (!running)
		set_running(0);
}

int main(int argc, char **argv)
{
	char line[512], text[256];
	unsigned long n, address;
	spawn(argc > 1 ? atoi(argv[1]) : 1);
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		text[0] = 0;
		if (!strcmp(line, "start")) {
			set_running(1);
			say("started");
		} else if (!strcmp(line, "stop")) {
			set_running(0);
			say("stopped");
		} else if (sscanf(line, "callp %lu %lx", &n, &address) == 2) {
			for (unsigned long i = 0; i < n; i++)
				one((long)i, (const char *)address);
			say("called %lu", n);
		} else if (sscanf(line, "call %lu %255[^\n]", &n, text) >= 1) {
			const char *s = text[0] ? text : "hello";
			uint64_t t0 = now_ns();
			for (unsigned long i = 0; i < n; i++)
				one((long)i, s);
			say("called %lu ns=%lu", n, (unsigned long)(now_ns() - t0));
		} else if (sscanf(line, "spawn %lu", &n) == 1) {
			spawn((int)n);
			say("spawned %lu", n);
		} else if (!strcmp(line, "six")) {
			say("six %ld", target_six(1, 2, 3, 4, 5, "six"));
		} else if (!strcmp(line, "count")) {
			/* done first: begun >= done then holds in what is printed, too */
			uint64_t d = done, b = begun;
			say("count begun=%lu done=%lu wrong=%lu threads=%d", b, d, (uint64_t)wrong, threads);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
