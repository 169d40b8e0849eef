#define _GNU_SOURCE
#include "common.h"

#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static unsigned char *pattern;
int epoll_fd = -1;

void die(const char *what)
{
    perror(what);
    exit(1);
}

double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

void make_pattern(void)
{
    uint32_t state = 12345;
    pattern = malloc(PERIOD + CHUNK);
    if (!pattern) die("malloc");
    for (uint32_t i = 0; i < PERIOD; i++) {
        state = state * 1664525 + 1013904223; /* Knuth's linear congruential generator */
        pattern[i] = (unsigned char)(state >> 24);
    }
    memcpy(pattern + PERIOD, pattern, CHUNK);
}

const unsigned char *pattern_at(uint64_t offset)
{
    return pattern + offset % PERIOD;
}

int pattern_matches(uint64_t *offset, const unsigned char *bytes, size_t length)
{
    while (length) {
        size_t part = length < CHUNK ? length : CHUNK;
        if (memcmp(pattern_at(*offset), bytes, part)) return 0;
        *offset += part;
        bytes += part;
        length -= part;
    }
    return 1;
}

void prepare_process(void)
{
    struct rlimit wanted = { 1 << 20, 1 << 20 };
    if (setrlimit(RLIMIT_NOFILE, &wanted)) {
        getrlimit(RLIMIT_NOFILE, &wanted);
        wanted.rlim_cur = wanted.rlim_max;
        setrlimit(RLIMIT_NOFILE, &wanted);
    }
    signal(SIGPIPE, SIG_IGN);
}

void start_workers(int count)
{
    for (int i = 1; i < count; i++)
        if (!fork()) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            return;
        }
}

int listen_on(const char *address, int port)
{
    int one = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    struct sockaddr_in own = { .sin_family = AF_INET, .sin_port = htons((uint16_t)port) };
    if (fd < 0) die("socket");
    if (address && inet_pton(AF_INET, address, &own.sin_addr) != 1) die(address);
    setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, &one, sizeof one);
    if (bind(fd, (struct sockaddr *)&own, sizeof own) || listen(fd, 65535)) die("bind, listen");
    return fd;
}

static void control(int operation, int fd, uint32_t events, void *context)
{
    struct epoll_event event = { .events = events, .data.ptr = context };
    if (epoll_ctl(epoll_fd, operation, fd, &event)) die("epoll_ctl");
}

void watch_add(int fd, uint32_t events, void *context)
{
    if (epoll_fd < 0 && (epoll_fd = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    control(EPOLL_CTL_ADD, fd, events, context);
}

void watch_change(int fd, uint32_t events, void *context)
{
    control(EPOLL_CTL_MOD, fd, events, context);
}

void set_nodelay(int fd)
{
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
}
