/* Threads in system calls that an attach must not interrupt: those that the kernel never restarts by itself.
 *
 *   blocking
 *   count              eintr= loops= failed=, then NAME.eintr= for each kind of call
 *   call N             the main thread calls the probed function N times
 *   wake               ends every wait that can be ended by its own event; answers when each thread has begun its next
 *
 * Every thread waits with a time-out of 100 ms or without one, calls `target_blocking`, and waits again.
 */
#include "target.h"
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ipc.h>
#include <sys/sem.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>

enum kind { EPOLL, POLL, SELECT, SEMTIMEDOP, SIGTIMEDWAIT, RECV, NANOSLEEP, FUTEX, READ, EPOLL_FOREVER, KINDS };
static const char *const names[KINDS] = {"epoll_wait", "poll", "select", "semtimedop", "sigtimedwait", "recv",
					 "nanosleep", "futex", "read", "epoll_forever"};
static counter eintr[KINDS], loops[KINDS], begun, done, failed;
static int semaphores = -1, event_read = -1, event_epoll = -1;

PROBED long target_blocking(long i)
{
	__asm__ volatile("" : "+r"(i));
	return i ^ 0x55;
}

static void call(long i)
{
	atomic_fetch_add(&begun, 1);
	if (target_blocking(i) != (i ^ 0x55))
		atomic_fetch_add(&failed, 1);
	atomic_fetch_add(&done, 1);
}

static void *waiter(void *arg)
{
	enum kind kind = (enum kind)(long)arg;
	int epoll = epoll_create1(0), pair[2];
	struct timespec tenth = {0, 100000000};
	struct timeval timeout = {0, 100000};
	struct sembuf take = {0, -1, 0};
	struct epoll_event event = {.events = EPOLLIN};
	sigset_t set;
	uint32_t word = 0;
	uint64_t value;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	if (socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
		die("socketpair");
	setsockopt(pair[0], SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout);
	if (kind == EPOLL_FOREVER && epoll_ctl(epoll, EPOLL_CTL_ADD, event_epoll, &event))
		die("epoll_ctl");
	for (long i = 0;; i++) {
		long result = 0;
		struct timeval t = timeout;
		loops[kind]++;
		errno = 0;
		switch (kind) {
		case EPOLL: result = epoll_wait(epoll, &event, 1, 100); break;
		case POLL: result = poll(NULL, 0, 100); break;
		case SELECT: result = select(0, NULL, NULL, NULL, &t); break;
		case SEMTIMEDOP: result = semtimedop(semaphores, &take, 1, &tenth); break;
		case SIGTIMEDWAIT: result = sigtimedwait(&set, NULL, &tenth); break;
		case RECV: result = recv(pair[0], &word, 1, 0); break;
		case NANOSLEEP: result = nanosleep(&tenth, NULL); break;
		case FUTEX: result = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &tenth, NULL, 0); break;
		case READ: result = read(event_read, &value, sizeof value); break;
		case EPOLL_FOREVER:
			result = epoll_wait(epoll, &event, 1, -1);
			if (result == 1 && read(event_epoll, &value, sizeof value) != sizeof value)
				atomic_fetch_add(&failed, 1);
			break;
		case KINDS: break;
		}
		if (result < 0 && errno == EINTR)
			atomic_fetch_add(&eintr[kind], 1);
		else if (result < 0 && errno != EAGAIN && errno != ETIMEDOUT)
			atomic_fetch_add(&failed, 1);
		call(i);
	}
	return NULL;
}

int main(void)
{
	char line[256];
	long n;
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGUSR2);
	pthread_sigmask(SIG_BLOCK, &set, NULL);
	(void)!unshare(CLONE_NEWIPC); /* where permitted: the semaphore then goes with the process, however that ends */
	semaphores = semget(IPC_PRIVATE, 1, 0600);
	event_read = eventfd(0, 0);
	event_epoll = eventfd(0, 0);
	if (semaphores < 0 || event_read < 0 || event_epoll < 0)
		die("semget or eventfd");
	for (long kind = 0; kind < KINDS; kind++) {
		pthread_t t;
		if ((errno = pthread_create(&t, NULL, waiter, (void *)kind)))
			die("pthread_create");
	}
	for (int kind = 0; kind < KINDS; kind++) /* all threads are on their way into their first wait */
		while (!loops[kind])
			sched_yield();
	say("ready %d", getpid());
	while (read_line(line, sizeof line)) {
		if (sscanf(line, "call %ld", &n) == 1) {
			for (long i = 0; i < n; i++)
				call(i);
			say("called %ld", n);
		} else if (!strcmp(line, "wake")) {
			uint64_t one = 1, l[KINDS];
			for (int kind = 0; kind < KINDS; kind++)
				l[kind] = loops[kind];
			if (write(event_read, &one, sizeof one) != sizeof one ||
			    write(event_epoll, &one, sizeof one) != sizeof one)
				die("eventfd");
			for (int kind = 0; kind < KINDS; kind++)
				while (loops[kind] == l[kind])
					sched_yield();
			say("woken");
		} else if (!strcmp(line, "count")) {
			char all[2000];
			uint64_t d = done, b = begun, interrupted = 0, total = 0;
			for (int kind = 0; kind < KINDS; kind++) {
				interrupted += eintr[kind];
				total += loops[kind];
			}
			int at = snprintf(all, sizeof all, "count begun=%lu done=%lu eintr=%lu loops=%lu failed=%lu", b, d,
					  interrupted, total, (uint64_t)failed);
			for (int kind = 0; kind < KINDS; kind++)
				at += snprintf(all + at, sizeof all - (size_t)at, " %s.eintr=%lu", names[kind],
					       (uint64_t)eintr[kind]);
			say("%s", all);
		} else if (!strcmp(line, "quit")) {
			break;
		} else {
			say("unknown %s", line);
		}
	}
	semctl(semaphores, 0, IPC_RMID);
	say("bye");
	_exit(0); /* the waiters are still waiting */
}
