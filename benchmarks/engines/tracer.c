/* The peer that any ptrace engine is held against: the least that one can do at a hit, in C.
 *
 * Usage: tracer PID KIND SITE:NEXT [SITE:NEXT]   (addresses in hex)
 *
 * Follows all threads of a process, and those that they make, without stopping them. At a hit of SITE it takes the registers,
 * puts what is wanted into a ring, and lets the thread go on at NEXT: the instruction after one that needs no more than that,
 * or a displaced copy that the caller has written. KIND says what is wanted: `count` (with time, ids and six arguments), or
 * `string` (the one of the second argument too). With a second site, that one is a return's: it pairs the two by the thread.
 *
 * Prints "armed"; on SIGTERM takes its bytes out, and prints "served HITS" of the first site.
 */
#include "target.h"
#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <stddef.h>
#include <sys/ptrace.h>
#include <sys/time.h>
#include <sys/user.h>
#include <sys/wait.h>

#define RING (1 << 16)
#define TASKS (1 << 22)

struct hit {
	uint64_t ts, latency;
	int pid, tid;
	unsigned long args[6];
	char text[64];
};

static struct hit ring[RING];
static uint64_t entered[TASKS]; /* by tid */
static volatile sig_atomic_t stop;

static void on_signal(int number)
{
	stop |= number == SIGTERM;
}

static void seize_all(pid_t pid)
{
	char path[64];
	struct dirent *entry;
	snprintf(path, sizeof path, "/proc/%d/task", pid);
	DIR *tasks = opendir(path);
	if (!tasks)
		die("%s", path);
	while ((entry = readdir(tasks)))
		if (entry->d_name[0] != '.' && ptrace(PTRACE_SEIZE, atoi(entry->d_name), 0, PTRACE_O_TRACECLONE))
			die("PTRACE_SEIZE %s", entry->d_name);
	closedir(tasks);
}

int main(int argc, char **argv)
{
	unsigned long sites[2] = {0}, nexts[2] = {0};
	uint8_t saved[2], int3 = 0xcc;
	int count = argc - 3, string, status, memory;
	uint64_t hits = 0;
	char path[64];
	if (count < 1 || count > 2)
		die("usage: tracer PID KIND SITE:NEXT [SITE:NEXT]");
	pid_t tid, pid = atoi(argv[1]);
	string = !strcmp(argv[2], "string");
	/* Without SA_RESTART: waitpid is to return. The timer is for a SIGTERM that came just before it. */
	struct sigaction action = {.sa_handler = on_signal};
	struct itimerval often = {{0, 100000}, {0, 100000}};
	sigaction(SIGTERM, &action, NULL);
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
	snprintf(path, sizeof path, "/proc/%d/mem", pid);
	if ((memory = open(path, O_RDWR)) < 0)
		die("%s", path);
	seize_all(pid);
	for (int i = 0; i < count; i++)
		if (sscanf(argv[3 + i], "%lx:%lx", &sites[i], &nexts[i]) != 2 || pread(memory, &saved[i], 1, (off_t)sites[i]) != 1 ||
		    pwrite(memory, &int3, 1, (off_t)sites[i]) != 1)
			die("%s", argv[3 + i]);
	say("armed");
	while (!stop) {
		struct user_regs_struct regs;
		if ((tid = waitpid(-1, &status, __WALL)) < 0) {
			if (errno == EINTR)
				continue;
			return 0; /* it has ended */
		}
		if (!WIFSTOPPED(status))
			continue;
		if (status >> 8 != SIGTRAP) { /* a clone's event, a new thread's first stop, or a signal */
			ptrace(PTRACE_CONT, tid, 0, status >> 16 ? 0 : WSTOPSIG(status));
			continue;
		}
		uint64_t ts = now_ns();
		ptrace(PTRACE_GETREGS, tid, 0, &regs);
		int second = regs.rip - 1 == sites[1];
		if (!second && regs.rip - 1 != sites[0]) {
			ptrace(PTRACE_CONT, tid, 0, SIGTRAP);
			continue;
		}
		ptrace(PTRACE_POKEUSER, tid, offsetof(struct user_regs_struct, rip), nexts[second]);
		struct hit *hit = &ring[hits % RING];
		*hit = (struct hit){ts, 0, pid, tid, {regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9}, ""};
		if (second) {
			hit->latency = ts - entered[tid % TASKS];
		} else {
			if (string && pread(memory, hit->text, sizeof hit->text, (off_t)regs.rsi) < 0)
				hit->text[0] = 0;
			entered[tid % TASKS] = ts;
			hits++;
		}
		ptrace(PTRACE_CONT, tid, 0, 0);
	}
	for (int i = 0; i < count; i++)
		if (pwrite(memory, &saved[i], 1, (off_t)sites[i]) != 1)
			die("taking out %lx", sites[i]);
	say("served %lu", hits);
	return 0; /* the kernel lets all threads go, without a stop */
}
