#define _GNU_SOURCE
#include "client.h"

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

struct sockaddr_in parse_address(const char *text)
{
    char host[64];
    int port;
    struct sockaddr_in address = { .sin_family = AF_INET };
    if (sscanf(text, "%63[^:]:%d", host, &port) != 2 || inet_pton(AF_INET, host, &address.sin_addr) != 1) {
        fprintf(stderr, "not an address and port: %s\n", text);
        exit(2);
    }
    address.sin_port = htons((uint16_t)port);
    return address;
}

int client_start(struct client *c, const struct destination *to)
{
    static unsigned turn;
    *c = (struct client){ .fd = -1, .way = to->way, .stage = CONNECTING, .target = to->target, .started = now() };
    c->target.sin_addr.s_addr = htonl(ntohl(to->target.sin_addr.s_addr) + turn++ % to->targets);
    const struct sockaddr_in *first = to->way == DIRECT ? &c->target : &to->proxy;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) return -1;
    set_nodelay(fd);
    if (connect(fd, (const struct sockaddr *)first, sizeof *first) && errno != EINPROGRESS) {
        int error = errno;
        close(fd);
        errno = error;
        return -1;
    }
    c->fd = fd;
    watch_add(fd, EPOLLOUT, c);
    return 0;
}

static int greet(struct client *c)
{
    char text[160];
    int length;
    if (c->way == HTTP) {
        char host[INET_ADDRSTRLEN];
        int port = ntohs(c->target.sin_port);
        inet_ntop(AF_INET, &c->target.sin_addr, host, sizeof host);
        length = snprintf(text, sizeof text, "CONNECT %s:%d HTTP/1.1\r\nHost: %s:%d\r\n\r\n", host, port, host, port);
    } else {
        memcpy(text, "\5\1\0", 3); /* RFC 1928: version, one method, no authentication */
        length = 3;
    }
    if (send(c->fd, text, (size_t)length, MSG_NOSIGNAL) != length) return -1;
    c->stage = GREETING;
    watch_change(c->fd, EPOLLIN, c);
    return 0;
}

static int opened(struct client *c)
{
    c->stage = OPEN;
    c->got = 0;
    return 1;
}

static int on_http(struct client *c)
{
    if (!memmem(c->reply, c->got, "\r\n\r\n", 4)) return c->got < sizeof c->reply ? 0 : -1;
    return c->got >= 12 && !memcmp(c->reply + 9, "200", 3) ? opened(c) : -1;
}

static int on_socks5(struct client *c)
{
    if (c->stage == GREETING) {
        if (c->got < 2) return 0;
        unsigned char request[10] = { 5, 1, 0, 1 };
        memcpy(request + 4, &c->target.sin_addr, 4);
        memcpy(request + 8, &c->target.sin_port, 2);
        if (send(c->fd, request, sizeof request, MSG_NOSIGNAL) != sizeof request) return -1;
        c->stage = REQUESTING;
        c->got = 0;
        return 0;
    }
    if (c->got < 10) return 0;
    return c->reply[1] == 0 ? opened(c) : -1;
}

int client_step(struct client *c, uint32_t events)
{
    if (c->stage == CONNECTING) {
        int error = 0;
        socklen_t length = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &length);
        if (error) {
            errno = error;
            return -1;
        }
        if (!(events & EPOLLOUT)) return events & (EPOLLERR | EPOLLHUP) ? -1 : 0;
        return c->way == DIRECT ? opened(c) : greet(c);
    }
    ssize_t got = recv(c->fd, c->reply + c->got, sizeof c->reply - c->got, 0);
    if (got <= 0) return got < 0 && errno == EAGAIN ? 0 : -1;
    c->got += (size_t)got;
    return c->way == HTTP ? on_http(c) : on_socks5(c);
}

void client_open(struct client *c, const struct destination *to)
{
    int state = 0;
    struct epoll_event event;
    if (client_start(c, to)) die("connect");
    while (!state)
        if (epoll_wait(epoll_fd, &event, 1, 10000) != 1 || (state = client_step(c, event.events)) < 0) die("connect");
    epoll_ctl(epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
    fcntl(c->fd, F_SETFL, 0);
}
