/* A program that maps its own code as few do.
 *
 *   mappings
 *   first N | last N   N calls of the function at the first, at the last byte of one page
 *   split              makes that page a mapping of its own
 *   alias private | shared | writable     maps the program's code once more, far away, in that way
 *   again N            N calls of the first function, there
 *   unmap | map        unmaps the page; maps the same page of the file there again
 *   other              maps other code there, which does the same
 *   move               moves the page to another address nearby (mremap), and calls it there from now on
 *   count              first= last= wrong=
 */
#include "target.h"
#include <fcntl.h>

#define PAGE 4096
typedef long function(long);
static uint64_t first_calls, last_calls, wrong;
extern char page_first[], page_last[], other_first[];

__asm__(".text\n.balign 4096\n.globl page_first\n.type page_first, @function\npage_first:\n"
	"  lea 7(%rdi,%rdi,2), %rax; ret\n.size page_first, .-page_first\n"
	".org page_first + 4095\n.globl page_last\n.type page_last, @function\npage_last:\n"
	"  nop; lea 9(%rdi,%rdi,2), %rax; ret\n.size page_last, .-page_last\n.balign 4096\n"
	"other_first:\n  mov %rdi, %rax; add %rdi, %rax; add %rdi, %rax; add $7, %rax; ret\n.balign 4096\n");

static char *first = page_first, *again;

static uint64_t call(char *f, long n, long constant)
{
	for (long i = 0; i < n; i++)
		if (((function *)f)(i) != i * 3 + constant)
			wrong++;
	return (uint64_t)n;
}

/* The mapping that an address is in: its start, end and file offset. */
static void find(const char *addr, uintptr_t *start, uintptr_t *end, unsigned long *offset)
{
	char line[512];
	FILE *maps = fopen("/proc/self/maps", "r");
	while (maps && fgets(line, sizeof line, maps))
		if (sscanf(line, "%lx-%lx %*s %lx", start, end, offset) == 3 && *start <= (uintptr_t)addr &&
		    (uintptr_t)addr < *end) {
			fclose(maps);
			return;
		}
	die("find");
}

static char *map_file(char *at, size_t size, unsigned long offset, int prot, int flags)
{
	int fd = open("/proc/self/exe", O_RDONLY);
	char *p = mmap(at, size, prot, flags, fd, (off_t)offset);
	if (p == MAP_FAILED)
		die("mmap");
	close(fd);
	return p;
}

static void alias(const char *how)
{
	uintptr_t start, end;
	unsigned long offset;
	find(first, &start, &end, &offset);
	int prot = PROT_READ | PROT_EXEC | (strcmp(how, "writable") ? 0 : PROT_WRITE);
	again = map_file(NULL, end - start, offset, prot, strcmp(how, "shared") ? MAP_PRIVATE : MAP_SHARED);
	again += (uintptr_t)first - start;
}

int main(void)
{
	char line[256], word[64];
	long n;
	uintptr_t start, end;
	unsigned long offset;
	find(page_first, &start, &end, &offset);
	offset += (uintptr_t)page_first - start;
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (sscanf(line, "first %ld", &n) == 1) {
			first_calls += call(first, n, 7);
			say("called %ld", n);
		} else if (sscanf(line, "last %ld", &n) == 1) {
			last_calls += call(page_last, n, 9);
			say("called %ld", n);
		} else if (sscanf(line, "again %ld", &n) == 1) {
			first_calls += call(again, n, 7);
			say("called %ld", n);
		} else if (!strcmp(line, "split")) {
			if (madvise(page_first, PAGE, MADV_DONTDUMP))
				die("madvise");
			say("split");
		} else if (sscanf(line, "alias %63s", word) == 1) {
			alias(word);
			say("aliased");
		} else if (!strcmp(line, "unmap")) {
			munmap(page_first, PAGE);
			say("unmapped");
		} else if (!strcmp(line, "map")) {
			map_file(page_first, PAGE, offset, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_FIXED);
			say("mapped");
		} else if (!strcmp(line, "other")) {
			mmap(page_first, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
			memcpy(page_first, other_first, 64);
			mprotect(page_first, PAGE, PROT_READ | PROT_EXEC);
			say("other");
		} else if (!strcmp(line, "move")) {
			first = mremap(page_first, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED,
				       mmap((void *)(start - (1 << 26)), PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
			if (first == MAP_FAILED)
				die("mremap");
			say("moved");
		} else if (!strcmp(line, "count")) {
			say("count first=%lu last=%lu wrong=%lu", first_calls, last_calls, wrong);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
