/* A function whose first instruction needs a displaced copy, and what may go wrong where a page has to be mapped for that.
 *
 *   slots [THREADS]
 *   call N             N calls, each with known values in every register; `wrong` goes up where one is another afterwards
 *   crowd              all threads call once, at the same moment
 *   run | rest         all threads call in a loop, or have stopped
 *   fork | vfork | clone N    a child (vfork, clone: in the same memory) calls N times; answers when it has ended
 *   signals N          N calls while a signal comes every 500 us, whose handler calls too; answers how many came
 *   filter             a seccomp filter that allows everything
 *   dispatch           what enters the kernel above the vDSO's start gets SIGSYS instead (PR_SET_SYSCALL_USER_DISPATCH)
 *   limit | free       RLIMIT_AS is what is used now; or is as it was
 *   lock               mlockall(MCL_CURRENT | MCL_FUTURE)
 *   unmap              unmaps every anonymous executable mapping but the vDSO
 *   over               maps ordinary memory over them instead; `stray=` says whether it is not all zeros afterwards
 *   heap N             moves the break up by N MiB
 *   count              begun= done= wrong=
 */
#include "target.h"
#include <linux/seccomp.h>
#include <linux/filter.h>
#include <asm/prctl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/auxv.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>

static counter *shared; /* also by children */
#define begun shared[0]
#define done shared[1]
#define wrong shared[2]
#define signals shared[3]
static _Atomic int running;
static int threads;
static pthread_barrier_t barrier;

/* push, so that it is not computed; it is not emulated either. Its file has room behind its code or not: see the tests. */
__asm__(".text\n"
	".globl target_slots\n"
	".type target_slots, @function\n"
	"target_slots:\n"
	"	lea known(%rip), %rax\n"
	"	ret\n"
	".size target_slots, . - target_slots\n"
	".data\n"
	"known:	.quad 42\n"
	".text\n");
extern long target_slots(void);
extern char known[] __attribute__((visibility("hidden")));

struct state {
	uint64_t general[16]; /* rax rcx rdx rbx rsp rbp rsi rdi r8 .. r15 */
	uint64_t flags;
	uint8_t vectors[16][16];
	uint64_t fs, gs;
};

/* Calls the function with every register at a known value, and writes down what they are afterwards. */
void with_registers(struct state *before, struct state *after);
__asm__(".text\n"
	".type with_registers, @function\n"
	"with_registers:\n"
	"	push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15; push %rsi; push %rdi\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	movdqu 136+16*\\n(%rdi), %xmm\\n\n"
	".endr\n"
	"	mov 8(%rdi), %rcx; mov 16(%rdi), %rdx; mov 24(%rdi), %rbx; mov 40(%rdi), %rbp; mov 48(%rdi), %rsi\n"
	"	mov 64(%rdi), %r8; mov 72(%rdi), %r9; mov 80(%rdi), %r10; mov 88(%rdi), %r11; mov 96(%rdi), %r12\n"
	"	mov 104(%rdi), %r13; mov 112(%rdi), %r14; mov 120(%rdi), %r15\n"
	"	push 128(%rdi); popf\n"
	"	mov 56(%rdi), %rdi\n"
	"	call target_slots\n"
	"	pushf\n"
	"	push %rdi\n"
	"	mov 24(%rsp), %rdi\n" /* after */
	"	mov %rax, 0(%rdi); mov %rcx, 8(%rdi); mov %rdx, 16(%rdi); mov %rbx, 24(%rdi); mov %rbp, 40(%rdi)\n"
	"	mov %rsi, 48(%rdi); mov %r8, 64(%rdi); mov %r9, 72(%rdi); mov %r10, 80(%rdi); mov %r11, 88(%rdi)\n"
	"	mov %r12, 96(%rdi); mov %r13, 104(%rdi); mov %r14, 112(%rdi); mov %r15, 120(%rdi)\n"
	"	pop 56(%rdi)\n"
	"	pop 128(%rdi)\n"
	".irp n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15\n"
	"	movdqu %xmm\\n, 136+16*\\n(%rdi)\n"
	".endr\n"
	"	pop %rdi; pop %rsi; pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
	"	cld\n"
	"	ret\n"
	".size with_registers, . - with_registers\n");

static void bases(struct state *s)
{
	syscall(SYS_arch_prctl, ARCH_GET_FS, &s->fs);
	syscall(SYS_arch_prctl, ARCH_GET_GS, &s->gs);
}

static void one(uint64_t i)
{
	struct state before, after;
	memset(&before, 0, sizeof before);
	memset(&after, 0, sizeof after);
	for (int r = 0; r < 16; r++)
		before.general[r] = 0x0123456789abcdefu * (uint64_t)(r + 1) + i;
	memset(before.vectors, 0x5a ^ (int)(i & 0xff), sizeof before.vectors);
	before.flags = 0x202 | (i & 1 ? 0x8d5 : 0) | (i & 2 ? 0x400 : 0); /* CF PF AF ZF SF OF, and DF */
	bases(&before);
	atomic_fetch_add(&begun, 1);
	with_registers(&before, &after);
	bases(&after);
	before.general[0] = (uint64_t)known;
	after.general[4] = before.general[4];
	if (memcmp(&before, &after, sizeof before))
		atomic_fetch_add(&wrong, 1);
	atomic_fetch_add(&done, 1);
}

static void *worker(void *arg)
{
	(void)arg;
	for (;;) {
		pthread_barrier_wait(&barrier);
		uint64_t i = 0;
		do
			one(i++);
		while (running);
		pthread_barrier_wait(&barrier);
	}
	return NULL;
}

static void handler(int number)
{
	(void)number;
	atomic_fetch_add(&signals, 1);
	one(7);
}

static void not_ours(int number)
{
	(void)number;
	atomic_fetch_add(&wrong, 1);
}

static int child(void *n)
{
	for (unsigned long i = 0; i < *(unsigned long *)n; i++)
		one(i);
	_exit(0);
}

static void await(pid_t pid)
{
	int status;
	while (waitpid(pid, &status, __WALL) < 0)
		if (errno != EINTR)
			die("waitpid");
	say("ended %d", status);
}

static unsigned long strays(int unmap)
{
	static struct { void *at; size_t length; } found[64];
	char line[512];
	int n = 0, stray = 0;
	FILE *f = fopen("/proc/self/maps", "re");
	while (f && fgets(line, sizeof line, f) && n < 64) {
		unsigned long from, to, inode;
		int at = 0;
		if (sscanf(line, "%lx-%lx r-xp %*x %*x:%*x %lu %n", &from, &to, &inode, &at) == 3 && !inode && !strchr(line + at, 'v')) {
			found[n].at = (void *)from;
			found[n++].length = to - from;
		}
	}
	if (f)
		fclose(f);
	for (int i = 0; i < n; i++) {
		if (unmap) {
			munmap(found[i].at, found[i].length);
			continue;
		}
		char *p = mmap(found[i].at, found[i].length, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
		for (size_t b = 0; b < found[i].length; b++)
			stray |= p[b];
	}
	return unmap ? (unsigned long)n : (unsigned long)!!stray;
}

int main(int argc, char **argv)
{
	char line[512], what[16];
	unsigned long n;
	int fd = -1;
	shared = shared_counters(&fd);
	threads = argc > 1 ? atoi(argv[1]) : 0;
	pthread_barrier_init(&barrier, NULL, (unsigned)threads + 1);
	syscall(SYS_arch_prctl, ARCH_SET_GS, shared);
	for (int i = 0; i < threads; i++) {
		pthread_t t;
		errno = pthread_create(&t, NULL, worker, NULL);
		if (errno)
			die("pthread_create");
	}
	signal(SIGALRM, handler);
	signal(SIGUSR1, handler);
	struct rlimit as;
	getrlimit(RLIMIT_AS, &as);
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (sscanf(line, "call %lu", &n) == 1) {
			for (unsigned long i = 0; i < n; i++)
				one(i);
			say("called %lu", n);
		} else if (!strcmp(line, "crowd")) {
			pthread_barrier_wait(&barrier);
			pthread_barrier_wait(&barrier);
			say("done");
		} else if (!strcmp(line, "run")) {
			running = 1;
			pthread_barrier_wait(&barrier);
			say("running");
		} else if (!strcmp(line, "rest")) {
			running = 0;
			pthread_barrier_wait(&barrier);
			say("resting");
		} else if (sscanf(line, "fork %lu", &n) == 1) {
			pid_t pid = fork();
			if (!pid)
				child(&n);
			await(pid);
		} else if (sscanf(line, "%5s %lu", what, &n) == 2 && (!strcmp(what, "vfork") || !strcmp(what, "clone"))) {
			static char stack[1 << 16] __attribute__((aligned(16)));
			await(clone(child, stack + sizeof stack, CLONE_VM | SIGCHLD | (*what == 'v' ? CLONE_VFORK : 0), &n));
		} else if (sscanf(line, "signals %lu", &n) == 1) {
			struct itimerval often = {{0, 500}, {0, 500}}, never = {{0, 0}, {0, 0}};
			uint64_t before = signals;
			setitimer(ITIMER_REAL, &often, NULL);
			for (unsigned long i = 0; i < n; i++)
				one(i);
			setitimer(ITIMER_REAL, &never, NULL);
			say("signals %lu", (unsigned long)(signals - before));
		} else if (!strcmp(line, "filter")) {
			struct sock_filter allow = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
			struct sock_fprog program = {1, &allow};
			if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
				die("seccomp");
			say("confined");
		} else if (!strcmp(line, "dispatch")) {
			signal(SIGSYS, not_ours);
			if (prctl(59, 1, 0, getauxval(AT_SYSINFO_EHDR), 0)) /* PR_SET_SYSCALL_USER_DISPATCH, PR_SYS_DISPATCH_ON */
				die("syscall user dispatch");
			say("dispatched");
		} else if (!strcmp(line, "limit") || !strcmp(line, "free")) {
			struct rlimit now = {*line == 'l' ? 1 << 20 : as.rlim_cur, as.rlim_max};
			if (setrlimit(RLIMIT_AS, &now))
				die("setrlimit");
			say("limited");
		} else if (!strcmp(line, "lock")) {
			if (mlockall(MCL_CURRENT | MCL_FUTURE))
				die("mlockall");
			say("locked");
		} else if (!strcmp(line, "unmap") || !strcmp(line, "over")) {
			say("stray=%lu", strays(*line == 'u'));
		} else if (sscanf(line, "heap %lu", &n) == 1) {
			char *end = sbrk((intptr_t)n << 20);
			if (end == (void *)-1)
				die("sbrk");
			end[(n << 20) - 1] = 1;
			say("moved");
		} else if (!strcmp(line, "count")) {
			uint64_t d = done, b = begun;
			say("count begun=%lu done=%lu wrong=%lu signals=%lu", b, d, (uint64_t)wrong, (uint64_t)signals);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
