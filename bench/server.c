/* server PORT WORKERS: the far end of every measured connection. The client's first byte says what happens:
 *   D  the server sends the payload until the client closes
 *   U  the server reads;  V  reads and compares.  After the client's half-close both answer "BYTES WRONG\n" and close
 *   R  for every 100 bytes, this one included, 100 bytes come back
 *   I  every byte, this one included, is answered with one byte
 *   W  the server answers with the address that it sees, and closes */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"

/* Calls for one connection before another has its turn. */
#define TURNS 8

struct connection {
    int fd;
    char mode, wrong;
    uint64_t offset;
    size_t asked;
};

static unsigned char buffer[CHUNK];

static void finish(struct connection *c)
{
    close(c->fd);
    free(c);
}

static void answer(struct connection *c, const void *bytes, size_t length)
{
    /* answers are far smaller than a socket's buffer; a client that is gone shows with the next recv */
    if (send(c->fd, bytes, length, MSG_NOSIGNAL) < 0) return;
}

static void send_payload(struct connection *c)
{
    for (int i = 0; i < TURNS; i++) {
        ssize_t sent = send(c->fd, pattern_at(c->offset), CHUNK, MSG_NOSIGNAL);
        if (sent < 0) {
            if (errno != EAGAIN) finish(c);
            return;
        }
        c->offset += (uint64_t)sent;
        if (sent < (ssize_t)CHUNK) return;
    }
}

static void tell_origin(struct connection *c)
{
    struct sockaddr_in peer;
    socklen_t length = sizeof peer;
    char text[INET_ADDRSTRLEN + 1] = "";
    if (!getpeername(c->fd, (struct sockaddr *)&peer, &length)) inet_ntop(AF_INET, &peer.sin_addr, text, INET_ADDRSTRLEN);
    strcat(text, "\n");
    answer(c, text, strlen(text));
}

static void at_end(struct connection *c)
{
    char text[64];
    if (c->mode == 'U' || c->mode == 'V') {
        int length = snprintf(text, sizeof text, "%llu %d\n", (unsigned long long)c->offset, c->wrong);
        answer(c, text, (size_t)length);
    }
}

/* The bytes behind the first of a D, U or V connection, and all bytes of the others. */
static void take(struct connection *c, const unsigned char *bytes, size_t length)
{
    switch (c->mode) {
    case 'R':
        for (c->asked += length; c->asked >= 100; c->asked -= 100) answer(c, pattern_at(0), 100);
        break;
    case 'I':
        while (length--) answer(c, "i", 1);
        break;
    case 'V':
        if (!pattern_matches(&c->offset, bytes, length)) {
            c->wrong = 1;
            c->offset += length;
        }
        break;
    default:
        c->offset += length;
    }
}

static void on_input(struct connection *c)
{
    for (int i = 0; i < TURNS; i++) {
        ssize_t got = recv(c->fd, buffer, CHUNK, 0);
        if (got < 0 && errno == EAGAIN) return;
        if (got <= 0) {
            if (!got) at_end(c);
            finish(c);
            return;
        }
        const unsigned char *bytes = buffer;
        size_t length = (size_t)got;
        if (!c->mode) {
            c->mode = (char)*bytes;
            if (c->mode == 'D') {
                watch_change(c->fd, EPOLLOUT, c);
                return;
            }
            if (c->mode == 'W') {
                tell_origin(c);
                finish(c);
                return;
            }
            if (c->mode == 'U' || c->mode == 'V') bytes++, length--;
        }
        take(c, bytes, length);
        if (got < (ssize_t)CHUNK) return;
    }
}

static void accept_all(int listener)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c) die("calloc");
        set_nodelay(fd);
        c->fd = fd;
        watch_add(fd, EPOLLIN, c);
    }
}

int main(int argc, char **argv)
{
    struct epoll_event events[256];
    if (argc != 3) return 2;
    prepare_process();
    make_pattern();
    start_workers(atoi(argv[2]));
    int listener = listen_on(NULL, atoi(argv[1]));
    watch_add(listener, EPOLLIN, NULL);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 256, -1);
        for (int i = 0; i < count; i++) {
            struct connection *c = events[i].data.ptr;
            if (!c) accept_all(listener);
            else if (c->mode != 'D') on_input(c);
            else if (events[i].events & (EPOLLERR | EPOLLHUP)) finish(c);
            else send_payload(c);
        }
    }
}
