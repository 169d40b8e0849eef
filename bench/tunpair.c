/* tunpair NEAR FAR NETNS-FD: copies packets between the TUN device NEAR, which it makes here, and FAR, which it makes in the network
 * namespace behind the descriptor NETNS-FD. There is no stack in between: TCP runs end to end between the two kernels. So this is
 * what a program behind a TUN costs at the very least. Both devices have virtio headers and TCP segmentation offload, as proxyvpn's has;
 * one thread for each direction. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "common.h"

/* virtio header and the largest packet */
#define FRAME (10 + 65535)
#define MTU 1500
#define QUEUE 10000

struct direction {
    int from, to;
};

static int make_tun(const char *name)
{
    int fd = open("/dev/net/tun", O_RDWR | O_CLOEXEC), control = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct ifreq request = { .ifr_flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR };
    if (fd < 0 || control < 0) die("/dev/net/tun");
    snprintf(request.ifr_name, IFNAMSIZ, "%s", name);
    if (ioctl(fd, TUNSETIFF, &request)) die("TUNSETIFF");
    if (ioctl(fd, TUNSETOFFLOAD, TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6)) die("TUNSETOFFLOAD");
    request.ifr_mtu = MTU;
    if (ioctl(control, SIOCSIFMTU, &request)) die("SIOCSIFMTU");
    request.ifr_qlen = QUEUE;
    if (ioctl(control, SIOCSIFTXQLEN, &request)) die("SIOCSIFTXQLEN");
    request.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(control, SIOCSIFFLAGS, &request)) die("SIOCSIFFLAGS");
    close(control);
    return fd;
}

static void *copy(void *argument)
{
    struct direction *direction = argument;
    static _Thread_local unsigned char frame[FRAME];
    for (;;) {
        ssize_t length = read(direction->from, frame, sizeof frame);
        if (length < 0) die("read");
        /* a packet that the other kernel does not take is lost, as on any link */
        if (write(direction->to, frame, (size_t)length) < 0) continue;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    if (argc != 4) return 2;
    int near = make_tun(argv[1]);
    if (setns(atoi(argv[3]), CLONE_NEWNET)) die("setns");
    int far = make_tun(argv[2]);
    static struct direction out, in;
    out = (struct direction){ near, far };
    in = (struct direction){ far, near };
    if (pthread_create(&thread, NULL, copy, &out)) die("pthread_create");
    copy(&in);
}
