/* A connection of the load generator to its target: directly, or through a proxy that it speaks to itself. */
#ifndef BENCH_CLIENT_H
#define BENCH_CLIENT_H
#include <netinet/in.h>
#include <stdint.h>

enum way { DIRECT, HTTP, SOCKS5 };

/* Where connections go. Targets rotate over `targets` addresses from `target` on. */
struct destination {
    struct sockaddr_in target, proxy;
    enum way way;
    unsigned targets;
};

/* How far the opening is. */
enum stage { CONNECTING, GREETING, REQUESTING, OPEN };

struct client {
    int fd; /* -1: none */
    enum way way;
    enum stage stage;
    struct sockaddr_in target;
    unsigned char reply[512];
    size_t got; /* bytes of the proxy's reply; once open, free for the user */
    double started;
    uint64_t offset;
    int settled;
};

/* Parses "IP:PORT"; ends the program on anything else. */
struct sockaddr_in parse_address(const char *text);

/* Starts to open a connection, watched by epoll with `c` as context; 0, or -1 when the kernel refuses. */
int client_start(struct client *c, const struct destination *to);

/* Goes on after `events`: 1 when it has just been opened, 0 when not yet, -1 when it failed (errno says why, if it does). */
int client_step(struct client *c, uint32_t events);

/* Opens a blocking connection, or ends the program. */
void client_open(struct client *c, const struct destination *to);
#endif
