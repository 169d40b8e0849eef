/* What the bench's programs share. */
#ifndef BENCH_COMMON_H
#define BENCH_COMMON_H
#include <stddef.h>
#include <stdint.h>

/* The most bytes in one call of recv or send. */
#define CHUNK 131072u
/* The payload repeats after so many bytes: a prime, so that a block that is lost, doubled or in the wrong place shows. */
#define PERIOD 1048573u

/* Prints "what: reason of errno" and ends the program. */
void die(const char *what) __attribute__((noreturn));

/* Seconds of the monotonic clock. */
double now(void);

/* Makes the payload; pattern_at() and pattern_matches() need it. */
void make_pattern(void);

/* At least CHUNK bytes of the payload from offset on. */
const unsigned char *pattern_at(uint64_t offset);

/* Does the payload from *offset on start with these bytes? Moves *offset behind them if so. */
int pattern_matches(uint64_t *offset, const unsigned char *bytes, size_t length);

/* As many descriptors as the system gives; SIGPIPE is ignored. */
void prepare_process(void);

/* Forks so that `count` processes run what follows; all end with the first. */
void start_workers(int count);

/* A non-blocking listener on every IPv4 address, or on `address`; several processes can share the port. */
int listen_on(const char *address, int port);

/* The program's one epoll instance, and changes to it; events[].data.ptr is `context`. */
extern int epoll_fd;
void watch_add(int fd, uint32_t events, void *context);
void watch_change(int fd, uint32_t events, void *context);

/* No delay for small segments. */
void set_nodelay(int fd);
#endif
