/* Opens and closes a library on command.
 *
 *   dl LIBRARY
 *   open | close       dlopen, dlclose
 *   call N             N calls of its function `dlfn`
 *   cycle N K          N times: open, K calls, close
 *   storm | calm       a thread that does cycles of 3 calls until calm
 *   count              begun= done= opens= wrong=
 */
#include "target.h"
#include <dlfcn.h>
#include <pthread.h>

typedef long function(long, const char *);
static counter begun, done, opens, wrong;
static _Atomic int storming;
static const char *path;

static void *open_library(function **f)
{
	void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
	if (!handle || !(*f = (function *)dlsym(handle, "dlfn"))) {
		fprintf(stderr, "%s\n", dlerror());
		exit(2);
	}
	atomic_fetch_add(&opens, 1);
	return handle;
}

static void calls(function *f, long n)
{
	for (long i = 0; i < n; i++) {
		atomic_fetch_add(&begun, 1);
		if (f(i, "dl") != i * 11 + 4)
			atomic_fetch_add(&wrong, 1);
		atomic_fetch_add(&done, 1);
	}
}

static void cycle(long k)
{
	function *f;
	void *handle = open_library(&f);
	calls(f, k);
	dlclose(handle);
}

static void *storm(void *arg)
{
	while (storming)
		cycle(3);
	return arg;
}

int main(int argc, char **argv)
{
	char line[256];
	long n, k;
	void *handle = NULL;
	function *f = NULL;
	pthread_t stormer;
	if (argc != 2)
		return 2;
	path = argv[1];
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (!strcmp(line, "open") && !handle) {
			handle = open_library(&f);
			say("opened");
		} else if (!strcmp(line, "close") && handle) {
			dlclose(handle);
			handle = NULL;
			say("closed");
		} else if (sscanf(line, "call %ld", &n) == 1 && handle) {
			calls(f, n);
			say("called %ld", n);
		} else if (sscanf(line, "cycle %ld %ld", &n, &k) == 2) {
			while (n--)
				cycle(k);
			say("cycled");
		} else if (!strcmp(line, "storm")) {
			storming = 1;
			errno = pthread_create(&stormer, NULL, storm, NULL);
			if (errno)
				die("pthread_create");
			say("storming");
		} else if (!strcmp(line, "calm")) {
			storming = 0;
			pthread_join(stormer, NULL);
			say("calm");
		} else if (!strcmp(line, "count")) {
			uint64_t d = done, b = begun;
			say("count begun=%lu done=%lu opens=%lu wrong=%lu", b, d, (uint64_t)opens, (uint64_t)wrong);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
