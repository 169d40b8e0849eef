/* relay PORT WORKERS: the bench's upstream proxy, as cheap as a proxy can be, so that its cost does not hide the programs that are
 * measured. HTTP CONNECT and SOCKS5 (RFC 1928) without authentication, to IPv4 addresses, told apart by the first byte. Bytes are moved
 * by splice(2), from socket to socket, and never seen. Pipes are pooled: an idle connection holds only its two sockets. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"

#define PIPE_SIZE (1 << 20)
#define MAX_POOLED 512
/* Moves for one direction before another connection has its turn. */
#define ROUNDS 16
/* The most bytes of a handshake. */
#define MAX_HELLO 1024

enum state { HELLO, SOCKS_REQUEST, DIALLING, RELAYING, DEAD };
enum { CLIENT, TARGET };

struct connection;
struct end {
    int fd;
    struct connection *of;
};
/* From ends[i] to the other one. */
struct direction {
    int pipe[2];
    size_t held;
    int finished, told;
};
struct connection {
    struct end ends[2];
    struct direction directions[2];
    enum state state;
    int is_http, queued;
    size_t length;
    unsigned char *hello; /* only during the handshake */
    struct connection *next;
};

static struct connection *ready, *dead;
static int pool[MAX_POOLED][2], pooled;

static int take_pipe(struct direction *d)
{
    if (pooled) {
        memcpy(d->pipe, pool[--pooled], sizeof d->pipe);
        return 0;
    }
    if (pipe2(d->pipe, O_NONBLOCK | O_CLOEXEC)) return -1;
    fcntl(d->pipe[0], F_SETPIPE_SZ, PIPE_SIZE);
    return 0;
}

static void give_pipe(struct direction *d)
{
    if (d->pipe[0] < 0) return;
    if (!d->held && pooled < MAX_POOLED) {
        memcpy(pool[pooled++], d->pipe, sizeof d->pipe);
    } else {
        close(d->pipe[0]);
        close(d->pipe[1]);
    }
    d->pipe[0] = d->pipe[1] = -1;
    d->held = 0;
}

/* Events of this round may still point to it: the memory is freed after them. */
static void end_connection(struct connection *c)
{
    if (c->state == DEAD) return;
    c->state = DEAD;
    for (int i = 0; i < 2; i++) {
        if (c->ends[i].fd >= 0) close(c->ends[i].fd);
        give_pipe(&c->directions[i]);
    }
    free(c->hello);
    c->hello = NULL;
    if (!c->queued) {
        c->next = dead;
        dead = c;
    }
}

static void watch(struct end *end)
{
    watch_add(end->fd, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, end);
}

static void say(struct connection *c, const char *bytes, size_t length)
{
    if (send(c->ends[CLIENT].fd, bytes, length, MSG_NOSIGNAL) != (ssize_t)length) end_connection(c);
}

static void say_no(struct connection *c)
{
    static const char http[] = "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n";
    if (c->is_http) say(c, http, sizeof http - 1);
    else say(c, "\5\5\0\1\0\0\0\0\0\0", 10);
    end_connection(c);
}

static void dial(struct connection *c, const struct sockaddr_in *target)
{
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd >= 0) {
        set_nodelay(fd);
        if (!connect(fd, (const struct sockaddr *)target, sizeof *target) || errno == EINPROGRESS) {
            c->ends[TARGET].fd = fd;
            c->state = DIALLING;
            watch(&c->ends[TARGET]);
            return;
        }
        close(fd);
    }
    say_no(c);
}

static void drop_bytes(struct connection *c, size_t count)
{
    c->length -= count;
    memmove(c->hello, c->hello + count, c->length);
}

static void on_connect(struct connection *c)
{
    char host[64];
    int port;
    struct sockaddr_in target = { .sin_family = AF_INET };
    unsigned char *end = memmem(c->hello, c->length, "\r\n\r\n", 4);
    if (!end) {
        if (c->length >= MAX_HELLO) end_connection(c);
        return;
    }
    *end = 0;
    c->is_http = 1;
    if (sscanf((char *)c->hello, "CONNECT %63[0-9.]:%d ", host, &port) != 2 || inet_pton(AF_INET, host, &target.sin_addr) != 1) {
        say_no(c);
        return;
    }
    target.sin_port = htons((uint16_t)port);
    drop_bytes(c, (size_t)(end + 4 - c->hello));
    dial(c, &target);
}

static void on_socks5(struct connection *c)
{
    struct sockaddr_in target = { .sin_family = AF_INET };
    if (c->state == HELLO) {
        if (c->length < 2 || c->length < 2u + c->hello[1]) return;
        drop_bytes(c, 2u + c->hello[1]);
        c->state = SOCKS_REQUEST;
        say(c, "\5\0", 2);
        if (c->state == DEAD) return;
    }
    if (c->length < 10) return;
    if (c->hello[1] != 1 || c->hello[3] != 1) { /* only CONNECT, only IPv4 */
        say_no(c);
        return;
    }
    memcpy(&target.sin_addr, c->hello + 4, 4);
    memcpy(&target.sin_port, c->hello + 8, 2);
    drop_bytes(c, 10);
    dial(c, &target);
}

static void on_hello(struct connection *c)
{
    while (c->length < MAX_HELLO) {
        ssize_t got = recv(c->ends[CLIENT].fd, c->hello + c->length, MAX_HELLO - c->length, 0);
        if (got < 0 && errno == EAGAIN) break;
        if (got <= 0) {
            end_connection(c);
            return;
        }
        c->length += (size_t)got;
    }
    if (!c->length) return;
    if (c->state == SOCKS_REQUEST || c->hello[0] == 5) on_socks5(c);
    else on_connect(c);
}

static void on_dialled(struct connection *c, uint32_t events)
{
    int error = 0;
    socklen_t size = sizeof error;
    if (!(events & (EPOLLOUT | EPOLLERR | EPOLLHUP))) return;
    getsockopt(c->ends[TARGET].fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        say_no(c);
        return;
    }
    if (c->is_http) say(c, "HTTP/1.1 200 OK\r\n\r\n", 19);
    else say(c, "\5\0\0\1\0\0\0\0\0\0", 10);
    if (c->state == DEAD) return;
    /* what the client sent behind its request */
    if (c->length && send(c->ends[TARGET].fd, c->hello, c->length, MSG_NOSIGNAL) != (ssize_t)c->length) {
        end_connection(c);
        return;
    }
    free(c->hello);
    c->hello = NULL;
    c->state = RELAYING;
}

/* Moves bytes one way: 1 when there may be more, 0 when it would block or is over, -1 when the connection is broken. */
static int move(struct connection *c, int from)
{
    struct direction *d = &c->directions[from];
    int source = c->ends[from].fd, sink = c->ends[1 - from].fd;
    for (int i = 0; i < ROUNDS; i++) {
        if (!d->held) {
            if (d->finished) {
                if (!d->told) {
                    d->told = 1;
                    shutdown(sink, SHUT_WR);
                }
                give_pipe(d);
                return 0;
            }
            if (d->pipe[0] < 0 && take_pipe(d)) return -1;
            ssize_t got = splice(source, NULL, d->pipe[1], NULL, PIPE_SIZE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
            if (got < 0) {
                if (errno != EAGAIN) return -1;
                give_pipe(d);
                return 0;
            }
            if (!got) {
                d->finished = 1;
                continue;
            }
            d->held = (size_t)got;
        }
        ssize_t put = splice(d->pipe[0], NULL, sink, NULL, d->held, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
        if (put < 0) return errno == EAGAIN ? 0 : -1;
        d->held -= (size_t)put;
    }
    return 1;
}

static void relay(struct connection *c)
{
    int up = move(c, CLIENT), down = up < 0 ? -1 : move(c, TARGET);
    if (up < 0 || down < 0 || (c->directions[CLIENT].told && c->directions[TARGET].told)) {
        end_connection(c);
    } else if ((up || down) && !c->queued) {
        c->queued = 1;
        c->next = ready;
        ready = c;
    }
}

static void on_event(struct end *end, uint32_t events)
{
    struct connection *c = end->of;
    if (c->state == HELLO || c->state == SOCKS_REQUEST) on_hello(c);
    else if (c->state == DIALLING && end == &c->ends[TARGET]) on_dialled(c, events);
    /* no "else": what came during the handshake raises no event of its own again */
    if (c->state == RELAYING) relay(c);
}

static void accept_all(int listener)
{
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0) {
        struct connection *c = calloc(1, sizeof *c);
        if (!c || !(c->hello = malloc(MAX_HELLO))) die("malloc");
        set_nodelay(fd);
        for (int i = 0; i < 2; i++) {
            c->ends[i] = (struct end){ -1, c };
            c->directions[i].pipe[0] = c->directions[i].pipe[1] = -1;
        }
        c->ends[CLIENT].fd = fd;
        watch(&c->ends[CLIENT]);
    }
}

static void run_ready(void)
{
    struct connection *c = ready, *next;
    ready = NULL;
    for (; c; c = next) {
        next = c->next;
        c->queued = 0;
        if (c->state == RELAYING) {
            relay(c);
        } else { /* it ended while it was queued */
            c->next = dead;
            dead = c;
        }
    }
    for (; dead; dead = next) {
        next = dead->next;
        free(dead);
    }
}

int main(int argc, char **argv)
{
    struct epoll_event events[256];
    if (argc != 3) return 2;
    prepare_process();
    start_workers(atoi(argv[2]));
    int listener = listen_on(NULL, atoi(argv[1]));
    watch_add(listener, EPOLLIN, NULL);
    for (;;) {
        int count = epoll_wait(epoll_fd, events, 256, ready ? 0 : -1);
        for (int i = 0; i < count; i++) {
            if (events[i].data.ptr) on_event(events[i].data.ptr, events[i].events);
            else accept_all(listener);
        }
        run_ready();
    }
}
