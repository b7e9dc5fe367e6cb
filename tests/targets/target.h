/* What every test target shares: the "ready" line, the command loop, counters that are the tests' oracle.
 *
 * A target prints "ready PID" and then obeys one command a line on standard input; each is answered by exactly one line,
 * after the command has taken effect. "count" answers "count NAME=VALUE ..."; "quit" or end of file ends the program.
 *
 * Counters come in pairs where threads run freely: `begun` goes up before a call and `done` after it, so that a test can
 * bound the calls inside any window from outside: at least done(end) - begun(start), at most begun(end) - done(start).
 */
#ifndef TRAPLINE_TARGET_H
#define TRAPLINE_TARGET_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

/* A function that no optimiser may inline, clone, or reason about: every call in the source is a call at run time. */
#define PROBED __attribute__((noipa, noinline, used, visibility("default")))

typedef _Atomic uint64_t counter;

static inline uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

__attribute__((format(printf, 1, 2))) static inline void say(const char *format, ...)
{
	char line[4096];
	va_list args;
	va_start(args, format);
	int n = vsnprintf(line, sizeof line - 1, format, args);
	va_end(args);
	if (n > (int)sizeof line - 2)
		n = sizeof line - 2;
	line[n++] = '\n';
	for (int at = 0; at < n;) { /* one write: lines of several processes do not mix */
		ssize_t w = write(1, line + at, (size_t)(n - at));
		if (w < 0 && errno != EINTR)
			_exit(3);
		if (w > 0)
			at += (int)w;
	}
}

__attribute__((noreturn, format(printf, 1, 2))) static inline void die(const char *format, ...)
{
	int saved = errno;
	va_list args;
	va_start(args, format);
	vfprintf(stderr, format, args);
	va_end(args);
	fprintf(stderr, ": %s\n", strerror(saved));
	exit(2);
}

/* Reads a line byte by byte, never ahead: a program that execs itself must leave what follows to its next image. */
static inline int read_line(char *line, size_t size)
{
	size_t n = 0;
	for (;;) {
		char c;
		ssize_t r = read(0, &c, 1);
		if (r < 0 && errno == EINTR)
			continue;
		if (r <= 0)
			return 0;
		if (c == '\n')
			break;
		if (n + 1 < size)
			line[n++] = c;
	}
	line[n] = 0;
	return 1;
}

/* Counters that forked and exec'd processes share: a memfd, mapped shared; the next image maps it again by number. */
static inline counter *shared_counters(int *fd)
{
	if (*fd < 0) {
		*fd = memfd_create("counters", 0);
		if (*fd < 0 || ftruncate(*fd, 4096))
			die("memfd");
	}
	counter *c = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
	if (c == MAP_FAILED)
		die("mmap of the counters");
	return c;
}

#endif
