/* A program that maps what is probed, calls it at once, and ends: what a hook that comes late misses.
 *
 *   once COUNTERS CALLS              its own function
 *   once COUNTERS CALLS LIBRARY      `dlfn` of a library that it opens
 *
 * COUNTERS is a file of at least 4 KB that all runs share: begun, done, runs, wrong.
 */
#include "target.h"
#include <dlfcn.h>
#include <fcntl.h>

enum { BEGUN, DONE, RUNS, WRONG };

PROBED long target_once(long i, const char *s)
{
	__asm__ volatile("" : "+r"(i) : "r"(s));
	return i * 11 + 4;
}

int main(int argc, char **argv)
{
	long (*f)(long, const char *) = target_once;
	if (argc < 3)
		return 2;
	int fd = open(argv[1], O_RDWR);
	if (fd < 0)
		die("%s", argv[1]);
	counter *shared = shared_counters(&fd);
	if (argc > 3) {
		void *handle = dlopen(argv[3], RTLD_NOW);
		if (!handle || !(f = (long (*)(long, const char *))dlsym(handle, "dlfn")))
			die("%s", argv[3]);
	}
	for (long i = 0; i < atol(argv[2]); i++) {
		atomic_fetch_add(&shared[BEGUN], 1);
		if (f(i, "once") != i * 11 + 4)
			atomic_fetch_add(&shared[WRONG], 1);
		atomic_fetch_add(&shared[DONE], 1);
	}
	atomic_fetch_add(&shared[RUNS], 1);
	return 0;
}
