/* steps: shows the steps that a process makes, and ends it with SIGKILL just before one of them.
 *
 *   steps NUMBER LOG -p PID    a process that runs; ends with it
 *   steps NUMBER LOG CMD...    becomes CMD, so that whoever started it has its process number
 *
 * A step is a system call that leaves something behind if the process is killed right after it: a change of the kernel's network state
 * (netlink, TUN devices), of files (creation, rename, removal, fsync) or of what a supervisor stores (a message with descriptors). What
 * only asks is none. NUMBER 0: no end. LOG gets the process number of this program, then a line for each step when it is done: seconds
 * since the epoch, its number, its kind, a detail. Numbers count over all threads.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <linux/netlink.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define THREADS 256
enum { RTNETLINK_GET = 2, NFNL_SUBSYS_NFTABLES = 10, NFNL_MSG_BATCH_BEGIN = 0x10 };

static pid_t leader;
static FILE *out;
static long wanted, count;
/* what each thread is in the middle of: nothing or a step to be told of when it is done */
static struct { pid_t tid; char told[256]; } inside[THREADS];

static void die(const char *what) { perror(what); exit(1); }

static size_t peek(uint64_t from, void *to, size_t length)
{
	struct iovec local = { to, length }, remote = { (void *)(uintptr_t)from, length };
	ssize_t got = process_vm_readv(leader, &local, 1, &remote, 1, 0);
	return got > 0 ? (size_t)got : 0;
}

/* Text without what would end a field of the log. */
static const char *field(char *text)
{
	for (char *c = text; *c; c++)
		if (*c <= ' ')
			*c = '?';
	return *text ? text : "-";
}

/* A path in the process. */
static const char *path_at(uint64_t from)
{
	static char path[128];
	/* up to the end of its page, in case the next is not there */
	size_t room = 4096 - from % 4096;
	memset(path, 0, sizeof path);
	peek(from, path, room < sizeof path - 1 ? room : sizeof path - 1);
	return field(path);
}

static const char *link_of(int fd)
{
	static char target[128];
	char name[64];
	snprintf(name, sizeof name, "/proc/%d/fd/%d", leader, fd);
	ssize_t length = readlink(name, target, sizeof target - 1);
	target[length > 0 ? length : 0] = 0;
	return field(target);
}

/* Family and protocol of a socket of the process. */
static bool netlink_protocol(int fd, int *protocol)
{
	int pidfd = syscall(SYS_pidfd_open, leader, 0), copy, domain = 0;
	socklen_t length = sizeof domain;
	if (pidfd < 0)
		return false;
	copy = syscall(SYS_pidfd_getfd, pidfd, fd, 0);
	close(pidfd);
	if (copy < 0)
		return false;
	bool yes = !getsockopt(copy, SOL_SOCKET, SO_DOMAIN, &domain, &length) && domain == AF_NETLINK
		&& !getsockopt(copy, SOL_SOCKET, SO_PROTOCOL, protocol, &length);
	close(copy);
	return yes;
}

/* What is sent on a netlink socket, if it changes anything. */
static bool sends(int fd, uint64_t from, size_t length, char *told, size_t room)
{
	static char buffer[1 << 17];
	struct nlmsghdr first;
	int protocol;
	if (!netlink_protocol(fd, &protocol))
		return false;
	length = peek(from, buffer, length < sizeof buffer ? length : sizeof buffer);
	if (length < sizeof first)
		return false;
	memcpy(&first, buffer, sizeof first);
	if (protocol == NETLINK_ROUTE && first.nlmsg_type >= NLMSG_MIN_TYPE && (first.nlmsg_type & 3) != RTNETLINK_GET) {
		snprintf(told, room, "rtnetlink %u", first.nlmsg_type);
		return true;
	}
	if (protocol == NETLINK_NETFILTER && first.nlmsg_type == NFNL_MSG_BATCH_BEGIN) {
		/* made and deleted in one transaction, and so nothing that stays */
		if (memmem(buffer, length, "proxyvpn-probe", 14))
			return false;
		snprintf(told, room, "nftables %zu", length);
		return true;
	}
	if (protocol == NETLINK_NETFILTER || protocol == NETLINK_ROUTE || protocol == NETLINK_SOCK_DIAG)
		return false;
	snprintf(told, room, "netlink-%d %u", protocol, first.nlmsg_type);
	return true;
}

/* Whether the call is a step; then `told` says which. */
static bool is_step(const struct __ptrace_syscall_info *info, char *told, size_t room)
{
	const uint64_t *args = info->entry.args;
	struct msghdr message;
	struct iovec vector;
	switch (info->entry.nr) {
	case SYS_sendto:
		return sends(args[0], args[1], args[2], told, room);
	case SYS_sendmsg:
		if (peek(args[1], &message, sizeof message) != sizeof message)
			return false;
		if (message.msg_controllen) {
			snprintf(told, room, "descriptors %s", link_of(args[0]));
			return true;
		}
		return message.msg_iovlen && peek((uintptr_t)message.msg_iov, &vector, sizeof vector) == sizeof vector
			&& sends(args[0], (uintptr_t)vector.iov_base, vector.iov_len, told, room);
	case SYS_ioctl:
		if (args[1] != TUNSETIFF)
			return false;
		snprintf(told, room, "tun -");
		return true;
	case SYS_openat:
		if (!(args[2] & O_CREAT) || !strncmp(path_at(args[1]), "/dev/", 5))
			return false;
		snprintf(told, room, "create %s", path_at(args[1]));
		return true;
	case SYS_rename:
		snprintf(told, room, "rename %s", path_at(args[1]));
		return true;
	case SYS_renameat:
	case SYS_renameat2:
		snprintf(told, room, "rename %s", path_at(args[3]));
		return true;
	case SYS_unlink:
		snprintf(told, room, "unlink %s", path_at(args[0]));
		return true;
	case SYS_unlinkat:
		snprintf(told, room, "unlink %s", path_at(args[1]));
		return true;
	case SYS_fsync:
	case SYS_fdatasync:
		snprintf(told, room, "fsync %s", link_of(args[0]));
		return true;
	default:
		return false;
	}
}

static char *slot(pid_t tid)
{
	int empty = -1;
	for (int i = 0; i < THREADS; i++) {
		if (inside[i].tid == tid)
			return inside[i].told;
		if (!inside[i].tid && empty < 0)
			empty = i;
	}
	if (empty < 0) {
		fprintf(stderr, "steps: more than %d threads\n", THREADS);
		exit(1);
	}
	inside[empty].tid = tid;
	inside[empty].told[0] = 0;
	return inside[empty].told;
}

static void at_call(pid_t tid)
{
	struct __ptrace_syscall_info info;
	char *told = slot(tid);
	struct timespec now;
	if (ptrace(PTRACE_GET_SYSCALL_INFO, tid, sizeof info, &info) <= 0)
		return;
	clock_gettime(CLOCK_REALTIME, &now);
	if (info.op == PTRACE_SYSCALL_INFO_EXIT && told[0]) {
		fprintf(out, "%lld.%06ld %s %s\n", (long long)now.tv_sec, now.tv_nsec / 1000, told, info.exit.is_error ? "failed" : "done");
		told[0] = 0;
	} else if (info.op == PTRACE_SYSCALL_INFO_ENTRY) {
		char kind[200];
		if (!is_step(&info, kind, sizeof kind))
			return;
		snprintf(told, sizeof inside[0].told, "%ld %s", ++count, kind);
		if (count == wanted) {
			fprintf(out, "%lld.%06ld %s killed\n", (long long)now.tv_sec, now.tv_nsec / 1000, told);
			kill(leader, SIGKILL);
		}
	}
}

static void seize(pid_t tid)
{
	if (ptrace(PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC) < 0 && errno != ESRCH)
		die("PTRACE_SEIZE");
	ptrace(PTRACE_INTERRUPT, tid, 0, 0);
}

static void seize_all(void)
{
	char name[64];
	snprintf(name, sizeof name, "/proc/%d/task", leader);
	DIR *tasks = opendir(name);
	if (!tasks)
		die(name);
	for (struct dirent *task; (task = readdir(tasks));)
		if (task->d_name[0] != '.')
			seize(atoi(task->d_name));
	closedir(tasks);
}

/* Until the process has ended. */
static void follow(void)
{
	int status;
	fprintf(out, "%d\n", getpid());
	for (pid_t tid; (tid = waitpid(-1, &status, __WALL)) > 0;) {
		if (WIFEXITED(status) || WIFSIGNALED(status)) {
			for (int i = 0; i < THREADS; i++)
				if (inside[i].tid == tid)
					inside[i].tid = 0;
			continue;
		}
		int signal = WSTOPSIG(status), event = status >> 16;
		if (signal == (SIGTRAP | 0x80)) {
			at_call(tid);
			signal = 0;
		} else if (event == PTRACE_EVENT_STOP && (signal == SIGSTOP || signal == SIGTSTP || signal == SIGTTIN || signal == SIGTTOU)) {
			/* stopped by somebody: it stays so */
			ptrace(PTRACE_LISTEN, tid, 0, 0);
			continue;
		} else if (event) {
			signal = 0;
		}
		ptrace(PTRACE_SYSCALL, tid, 0, signal);
	}
}

int main(int argc, char **argv)
{
	if (argc < 4) {
		fprintf(stderr, "usage: steps NUMBER LOG -p PID | CMD...\n");
		return 2;
	}
	wanted = atol(argv[1]);
	out = fopen(argv[2], "we");
	if (!out)
		die(argv[2]);
	setvbuf(out, NULL, _IOLBF, 0);
	if (!strcmp(argv[3], "-p") && argc == 5) {
		leader = atoi(argv[4]);
		seize_all();
		follow();
		return 0;
	}
	int ready[2];
	if (pipe2(ready, O_CLOEXEC) < 0)
		die("pipe");
	leader = getpid();
	/* the one who looks is nobody's child, so that the process has no child that it does not know */
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (child == 0) {
		if (fork() != 0)
			_exit(0);
		setsid();
		seize(leader);
		close(ready[0]);
		close(ready[1]);
		follow();
		_exit(0);
	}
	waitpid(child, NULL, 0);
	close(ready[1]);
	char end;
	if (read(ready[0], &end, 1) < 0)
		die("read");
	execvp(argv[3], argv + 3);
	die(argv[3]);
}
