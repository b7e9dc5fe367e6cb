/* Calls a function so many times a second, or without a pause, until it is told to stop.
 *
 *   paced RATE         hits a second; 0: none
 *   count              begun= done=
 */
#include "target.h"
#include <pthread.h>

static counter begun, done;
static long rate;

PROBED long target_paced(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	return i * 3 + 1;
}

static void *worker(void *arg)
{
	struct timespec next;
	clock_gettime(CLOCK_MONOTONIC, &next);
	for (long i = 0;; i++) {
		next.tv_nsec += 1000000000 / rate;
		if (next.tv_nsec >= 1000000000) {
			next.tv_nsec -= 1000000000;
			next.tv_sec++;
		}
		clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &next, NULL);
		atomic_fetch_add(&begun, 1);
		if (target_paced(i, "paced") != i * 3 + 1)
			_exit(4);
		atomic_fetch_add(&done, 1);
	}
	return arg;
}

int main(int argc, char **argv)
{
	char line[64];
	pthread_t t;
	rate = argc > 1 ? atol(argv[1]) : 0;
	if (rate && (errno = pthread_create(&t, NULL, worker, NULL)))
		die("pthread_create");
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		uint64_t d = done, b = begun;
		if (strcmp(line, "count"))
			say("unknown %s", line);
		else
			say("count begun=%lu done=%lu", b, d);
	}
	return 0;
}
