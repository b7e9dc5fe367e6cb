/* Threads that call probed functions under a storm of signals.
 *
 *   signals [THREADS]
 *   start | stop       workers run and are stormed, or stand still (stop answers when every signal has been handled)
 *   count              begun= done= wrong= sent= handled= timers= inner= outside=
 *
 * Two sources: a sender queues SIGRTMIN to the workers (each is delivered, so sent == handled after stop), and each worker
 * has a timer that sends SIGUSR1 to it (overruns merge, `timers` only grows). The handler calls a probed function too
 * (`inner`), and looks at the interrupted rip: it must lie in the code of a loaded object as the linker laid it out, to the
 * byte, never in memory that an engine put there or in the slack behind the text (`outside`).
 */
#include "target.h"
#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <ucontext.h>

#define MAX_THREADS 32
#define MAX_RANGES 64
static counter begun, done, wrong, sent, handled, timers, inner, outside, parked;
static _Atomic int running;
static _Atomic uintptr_t last_outside;
static int threads;
static pthread_t ids[MAX_THREADS];
static counter pending[MAX_THREADS];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static __thread int self = -1;
static struct { uintptr_t start, end; } ranges[MAX_RANGES];
static int range_count;

/* First instruction of one byte-pattern that is simple to emulate (push), one that needs a displaced copy (imul). */
long target_push(long i);
long target_imul(long i);
__asm__(".text\n.balign 16\n.globl target_push\n.type target_push, @function\ntarget_push:\n"
	"  push %rbp; mov %rsp, %rbp; lea 1(%rdi,%rdi,2), %rax; pop %rbp; ret\n.size target_push, .-target_push\n"
	".balign 16\n.globl target_imul\n.type target_imul, @function\ntarget_imul:\n"
	"  imul $3, %rdi, %rax; add $1, %rax; ret\n.size target_imul, .-target_imul\n");

PROBED long target_inner(long i)
{
	__asm__ volatile("" : "+r"(i));
	return i + 1;
}

static int collect(struct dl_phdr_info *info, size_t size, void *arg)
{
	(void)size, (void)arg;
	for (int i = 0; i < info->dlpi_phnum; i++) {
		const ElfW(Phdr) *p = &info->dlpi_phdr[i];
		if (p->p_type == PT_LOAD && p->p_flags & PF_X && range_count < MAX_RANGES) {
			ranges[range_count].start = info->dlpi_addr + p->p_vaddr;
			ranges[range_count++].end = info->dlpi_addr + p->p_vaddr + p->p_filesz;
		}
	}
	return 0;
}

static void on_signal(int number, siginfo_t *si, void *context)
{
	uintptr_t rip = (uintptr_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
	int saved = errno, inside = 0;
	(void)si;
	for (int i = 0; i < range_count; i++)
		inside |= ranges[i].start <= rip && rip < ranges[i].end;
	if (!inside) {
		atomic_fetch_add(&outside, 1);
		last_outside = rip;
	}
	if (target_inner(number) != number + 1)
		atomic_fetch_add(&wrong, 1);
	atomic_fetch_add(&inner, 1);
	if (number == SIGUSR1) {
		atomic_fetch_add(&timers, 1);
	} else {
		if (self >= 0)
			atomic_fetch_sub(&pending[self], 1);
		atomic_fetch_add(&handled, 1);
	}
	errno = saved;
}

static void *worker(void *arg)
{
	timer_t timer;
	struct sigevent event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGUSR1};
	struct itimerspec every = {{0, 1000000}, {0, 1000000}}, never = {{0, 0}, {0, 0}};
	self = (int)(long)arg;
	event._sigev_un._tid = (pid_t)syscall(SYS_gettid);
	if (timer_create(CLOCK_MONOTONIC, &event, &timer))
		die("timer_create");
	for (long i = 0;; i++) {
		if (!running) {
			timer_settime(timer, 0, &never, NULL);
			pthread_mutex_lock(&lock);
			parked++;
			pthread_cond_broadcast(&changed);
			while (!running)
				pthread_cond_wait(&changed, &lock);
			parked--;
			pthread_mutex_unlock(&lock);
			timer_settime(timer, 0, &every, NULL);
		}
		atomic_fetch_add(&begun, 2);
		if (target_push(i) != i * 3 + 1 || target_imul(i) != i * 3 + 1)
			atomic_fetch_add(&wrong, 1);
		atomic_fetch_add(&done, 2);
	}
	return NULL;
}

static void *sender(void *arg)
{
	for (;;) {
		pthread_mutex_lock(&lock);
		while (!running)
			pthread_cond_wait(&changed, &lock);
		pthread_mutex_unlock(&lock);
		for (int i = 0; i < threads; i++) {
			union sigval value = {.sival_int = i};
			if (pending[i] >= 16) /* stay far below RLIMIT_SIGPENDING */
				continue;
			atomic_fetch_add(&pending[i], 1);
			atomic_fetch_add(&sent, 1);
			if (pthread_sigqueue(ids[i], SIGRTMIN, value)) {
				atomic_fetch_sub(&pending[i], 1);
				atomic_fetch_sub(&sent, 1);
			}
		}
		sched_yield();
	}
	return arg;
}

static void set_running(int value)
{
	pthread_mutex_lock(&lock);
	running = value;
	pthread_cond_broadcast(&changed);
	while (!value && parked < (uint64_t)threads)
		pthread_cond_wait(&changed, &lock);
	pthread_mutex_unlock(&lock);
	while (!value && handled < sent) /* what is queued reaches a waiting thread at once */
		sched_yield();
}

int main(int argc, char **argv)
{
	char line[256];
	pthread_t sends;
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigset_t storm;
	threads = argc > 1 ? atoi(argv[1]) : 2;
	if (threads < 1 || threads > MAX_THREADS)
		return 2;
	dl_iterate_phdr(collect, NULL);
	sigaction(SIGUSR1, &action, NULL);
	sigaction(SIGRTMIN, &action, NULL);
	for (int i = 0; i < threads; i++)
		if ((errno = pthread_create(&ids[i], NULL, worker, (void *)(long)i)))
			die("pthread_create");
	sigemptyset(&storm); /* the main thread and the sender stay out of it */
	sigaddset(&storm, SIGUSR1);
	sigaddset(&storm, SIGRTMIN);
	pthread_sigmask(SIG_BLOCK, &storm, NULL);
	set_running(0);
	if ((errno = pthread_create(&sends, NULL, sender, NULL)))
		die("pthread_create");
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (!strcmp(line, "start")) {
			set_running(1);
			say("started");
		} else if (!strcmp(line, "stop")) {
			set_running(0);
			say("stopped");
		} else if (!strcmp(line, "count")) {
			uint64_t d = done, b = begun;
			say("count begun=%lu done=%lu wrong=%lu sent=%lu handled=%lu timers=%lu inner=%lu outside=%lu last_outside=%lu",
			    b, d, (uint64_t)wrong, (uint64_t)sent, (uint64_t)handled, (uint64_t)timers, (uint64_t)inner,
			    (uint64_t)outside, (uint64_t)last_outside);
		} else if (!strcmp(line, "quit")) {
			say("bye");
			return 0;
		} else {
			say("unknown %s", line);
		}
	}
	return 0;
}
