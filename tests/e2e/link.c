/* link NETNS-A NAME-A NETNS-B NAME-B KBIT/S ONE-WAY-MS LOSS-PER-MILLE QUEUE-BYTES: a slow, long and lossy wire between two network
 * namespaces, each given by its file in /proc. Each gets a TUN device; packets are copied between them at that rate, after that delay. A
 * packet that finds the queue full is dropped, and so is by chance the given share. Chance is seeded: the n-th packet of a direction has
 * the same fate in every run, and again after SIGUSR1. Prints a line when the devices are there; ends with its parent. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MTU 1500
/* packets on the wire and in the queue, in each direction */
#define PLACES 4096
#define SECOND 1000000000ull

struct packet {
    uint64_t due;
    size_t length;
    unsigned char bytes[MTU];
};
struct direction {
    int from, to;
    uint64_t free_at; /* when the wire has sent what it was given */
    uint64_t chance;
    unsigned first, count;
    struct packet *packets;
};

static uint64_t rate, delay, loss, queue;
static volatile sig_atomic_t reseed = 1;

static void die(const char *what)
{
    perror(what);
    exit(1);
}

static void on_reseed(int number)
{
    (void)number;
    reseed = 1;
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * SECOND + (uint64_t)time.tv_nsec;
}

static int make_tun(const char *netns, const char *name)
{
    struct ifreq request = { .ifr_flags = IFF_TUN | IFF_NO_PI };
    int space = open(netns, O_RDONLY | O_CLOEXEC);
    if (space < 0 || setns(space, CLONE_NEWNET)) die(netns);
    close(space);
    int fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK | O_CLOEXEC), control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || control < 0) die("/dev/net/tun");
    snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
    if (ioctl(fd, TUNSETIFF, &request)) die("TUNSETIFF");
    request.ifr_mtu = MTU;
    if (ioctl(control, SIOCSIFMTU, &request)) die("SIOCSIFMTU");
    close(control);
    return fd;
}

/* xorshift64 (Marsaglia, 2003): per mille */
static uint64_t draw(struct direction *d)
{
    d->chance ^= d->chance << 13;
    d->chance ^= d->chance >> 7;
    d->chance ^= d->chance << 17;
    return (d->chance >> 16) % 1000;
}

static void take_in(struct direction *d)
{
    static unsigned char bytes[MTU];
    ssize_t length;
    while ((length = read(d->from, bytes, sizeof bytes)) > 0) {
        uint64_t time = now(), start = d->free_at > time ? d->free_at : time;
        uint64_t waiting = (start - time) * rate / 8 / SECOND;
        if (draw(d) < loss || waiting + (uint64_t)length > queue || d->count == PLACES) continue;
        d->free_at = start + (uint64_t)length * 8 * SECOND / rate;
        struct packet *packet = &d->packets[(d->first + d->count++) % PLACES];
        packet->due = d->free_at + delay;
        packet->length = (size_t)length;
        memcpy(packet->bytes, bytes, (size_t)length);
    }
    if (length < 0 && errno != EAGAIN && errno != EINTR && errno != EIO) die("read");
}

/* Delivers what is due; returns when the next packet is, or `next`. */
static uint64_t deliver(struct direction *d, uint64_t next)
{
    for (; d->count; d->first = (d->first + 1) % PLACES, d->count--) {
        struct packet *packet = &d->packets[d->first];
        if (packet->due > now()) return packet->due < next ? packet->due : next;
        /* a device that is down takes nothing, as a wire that is cut */
        if (write(d->to, packet->bytes, packet->length) < 0) continue;
    }
    return next;
}

int main(int argc, char **argv)
{
    static struct direction directions[2];
    if (argc != 9) return 2;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    signal(SIGUSR1, on_reseed);
    int near = make_tun(argv[1], argv[2]), far = make_tun(argv[3], argv[4]);
    rate = strtoull(argv[5], NULL, 10) * 1000;
    delay = strtoull(argv[6], NULL, 10) * 1000000;
    loss = strtoull(argv[7], NULL, 10);
    queue = strtoull(argv[8], NULL, 10);
    if (!rate) return 2;
    for (int i = 0; i < 2; i++) {
        directions[i] = (struct direction){ .from = i ? far : near, .to = i ? near : far };
        directions[i].packets = calloc(PLACES, sizeof(struct packet));
        if (!directions[i].packets) die("calloc");
    }
    puts("ready");
    fflush(stdout);
    for (;;) {
        uint64_t next = UINT64_MAX;
        if (reseed) {
            reseed = 0;
            for (int i = 0; i < 2; i++) directions[i].chance = 0x9e3779b97f4a7c15u + (uint64_t)i;
        }
        for (int i = 0; i < 2; i++) {
            take_in(&directions[i]);
            next = deliver(&directions[i], next);
        }
        uint64_t time = now(), wait = next > time ? next - time : 0;
        if (wait > SECOND) wait = SECOND;
        struct timespec timeout = { .tv_sec = (time_t)(wait / SECOND), .tv_nsec = (long)(wait % SECOND) };
        struct pollfd readable[2] = { { .fd = near, .events = POLLIN }, { .fd = far, .events = POLLIN } };
        if (ppoll(readable, 2, &timeout, NULL) < 0 && errno != EINTR) die("ppoll");
    }
}
