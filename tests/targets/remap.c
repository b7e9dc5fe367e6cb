/* Maps the code of a library by hand, takes it away again, and puts other things in its place.
 *
 *   remap LIBRARY START LENGTH OFFSET     its executable segment in the file, and the function `dlfn` in it
 *   map | again        maps the segment at the place (again: over itself, fresh bytes)
 *   unmap              takes it away; the place stays reserved
 *   zeros              anonymous memory at the place, as it comes
 *   other              the same file's first pages at the place, read-only
 *   move               mremaps the segment from the place to another, and obeys there from now on (back: the other way)
 *   tail               unmaps all but the first page
 *   call N             N calls of the function where it is mapped now
 *   stray WHAT         stray=1 where the place is not what zeros or other put there; unmap: 0
 *   storm | calm       a thread that does map, 3 calls, zeros, look for strays, other, look, unmap until calm
 *   count              begun= done= wrong= maps= stray= passing=    (passing: strays that were gone within a second)
 */
#include "target.h"
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>

typedef long function(long, const char *);
static counter begun, done, wrong, maps, strays, passing;
static _Atomic int storming;
static int file;
static size_t start, length, offset;
static unsigned char *place, *elsewhere, *first_pages;

static void *at(void *address, int protection, int flags, int fd, size_t from)
{
	void *got = mmap(address, length, protection, MAP_FIXED | MAP_PRIVATE | flags, fd, (off_t)from);
	if (got == MAP_FAILED)
		die("mmap");
	return got;
}

static void map(void)
{
	at(place, PROT_READ | PROT_EXEC, 0, file, start);
	atomic_fetch_add(&maps, 1);
}

static void unmap(void)
{
	at(place, PROT_NONE, MAP_ANONYMOUS, -1, 0);
}

static void zeros(void)
{
	at(place, PROT_READ | PROT_WRITE, MAP_ANONYMOUS, -1, 0);
}

static int stray_zeros(void)
{
	int stray = 0;
	for (size_t i = 0; i < length; i++)
		stray |= place[i] != 0;
	return stray;
}

static void other(void)
{
	at(place, PROT_READ, 0, file, 0);
}

static int stray_other(void)
{
	return memcmp(place, first_pages, 4096) != 0;
}

static void calls(unsigned char *base, long n)
{
	function *f = (function *)(base + (offset - start));
	for (long i = 0; i < n; i++) {
		atomic_fetch_add(&begun, 1);
		if (f(i, "remap") != i * 11 + 4)
			atomic_fetch_add(&wrong, 1);
		atomic_fetch_add(&done, 1);
	}
}

static void look(int (*stray)(void))
{
	if (!stray())
		return;
	for (uint64_t until = now_ns() + 1000000000u; now_ns() < until;)
		if (!stray()) {
			atomic_fetch_add(&passing, 1);
			return;
		}
	atomic_fetch_add(&strays, 1);
}

static void *storm(void *arg)
{
	while (storming) {
		map();
		calls(place, 3);
		zeros();
		look(stray_zeros);
		other();
		look(stray_other);
		unmap();
	}
	return arg;
}

int main(int argc, char **argv)
{
	char line[256];
	long n;
	pthread_t stormer;
	struct stat status;
	if (argc != 5)
		return 2;
	file = open(argv[1], O_RDONLY);
	start = strtoul(argv[2], NULL, 0);
	length = strtoul(argv[3], NULL, 0);
	offset = strtoul(argv[4], NULL, 0);
	if (file < 0 || fstat(file, &status))
		die("open");
	place = mmap(NULL, 4 * length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	first_pages = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, file, 0);
	if (place == MAP_FAILED || first_pages == MAP_FAILED)
		die("mmap");
	elsewhere = place + 2 * length;
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (!strcmp(line, "map") || !strcmp(line, "again")) {
			map();
			say("mapped");
		} else if (!strcmp(line, "unmap")) {
			unmap();
			say("unmapped");
		} else if (!strcmp(line, "zeros")) {
			zeros();
			say("zeros");
		} else if (!strcmp(line, "other")) {
			other();
			say("other");
		} else if (!strcmp(line, "move")) {
			if (mremap(place, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere) == MAP_FAILED)
				die("mremap");
			unsigned char *was = place;
			place = elsewhere;
			elsewhere = was;
			say("moved");
		} else if (!strcmp(line, "tail")) {
			if (munmap(place + 4096, length - 4096))
				die("munmap");
			say("first page");
		} else if (sscanf(line, "call %ld", &n) == 1) {
			calls(place, n);
			say("called %ld", n);
		} else if (!strcmp(line, "stray zeros")) {
			say("stray=%d", stray_zeros());
		} else if (!strcmp(line, "stray other")) {
			say("stray=%d", stray_other());
		} else if (!strcmp(line, "stray unmap")) {
			say("stray=0");
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
			say("count begun=%lu done=%lu wrong=%lu maps=%lu stray=%lu passing=%lu", b, d, (uint64_t)wrong,
			    (uint64_t)maps, (uint64_t)strays, (uint64_t)passing);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
