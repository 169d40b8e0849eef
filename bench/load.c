/* load WHAT -t IP:PORT [-x http:IP:PORT | socks5:IP:PORT] [-T TARGETS] [-n COUNT] [-d SECONDS] [-w WARM-UP] ...
 *   bulk -m D|U [-v]   COUNT flows down or up; -v: every byte is compared, an upload ends by half-close and the server's count
 *   conns              short connections, at most COUNT at once: open, 100 bytes there and back, close
 *     [-c TOTAL]       ends when so many are through, not after SECONDS
 *     [-r RATE]        opens so many per second, and not each as soon as another is over; after SECONDS it waits for those that are open
 *     [-p]             prints how far it is, a line of JSON each second
 *   idle               COUNT connections; prints a line when they are open, holds them until stdin ends, then uses each again
 *   ping [-s] [-g US]  on one connection 100 bytes there and back, again and again, US microseconds apart; -s: written in two halves
 *   open               prints what connect(2) says: "open", "refused", "closed" (accepted, then ended) or "silent"
 *   origin             prints the address that the server sees
 * Without -x the target is connected to directly. -T: targets rotate over so many addresses. Ends with one line of JSON (idle: two).
 * Exit status: 0, 1 a connection failed or was lost, 2 usage, 3 wrong bytes. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "client.h"
#include "common.h"

#define BATCH 256
/* A short connection that takes longer is lost. */
#define PATIENCE 10.0
/* The most latencies that are kept: the latest ones. */
#define SAMPLES (1u << 22)
/* Idle connections that are being opened at one time. */
#define OPENING 64
#define MESSAGE 100

static struct options {
    struct destination to;
    int count;
    double seconds, warm_up;
    long total, rate;
    char mode;
    int verify, split, gap, progress;
} options = { .to = { .targets = 1 }, .count = 1, .seconds = 3, .mode = 'D' };

static unsigned char buffer[CHUNK];
static struct epoll_event events[BATCH];
static float *samples;
static size_t sampled; /* how many were taken; samples[] has the last SAMPLES of them */

static int compare(const void *left, const void *right)
{
    float a = *(const float *)left, b = *(const float *)right;
    return (a > b) - (a < b);
}

static void keep_sample(double seconds)
{
    samples[sampled++ % SAMPLES] = (float)(seconds * 1e6);
}

static size_t kept_samples(void)
{
    return sampled < SAMPLES ? sampled : SAMPLES;
}

static void sort_samples(void)
{
    qsort(samples, kept_samples(), sizeof *samples, compare);
}

/* Microseconds that this share of the sorted samples does not exceed. */
static double percentile(double share)
{
    return sampled ? samples[(size_t)((double)(kept_samples() - 1) * share)] : 0;
}

/* ends the program without waiting for what is still on its way */
static void done(int status) __attribute__((noreturn));
static void done(int status)
{
    fflush(stdout);
    _exit(status);
}

static struct client *make_clients(void)
{
    struct client *all = calloc((size_t)options.count, sizeof *all);
    samples = malloc(SAMPLES * sizeof *samples);
    if (!all || !samples) die("malloc");
    return all;
}

/* ---- bulk ---- */

static uint64_t moved;

static void lost(const struct client *c, ssize_t result)
{
    fprintf(stderr, "a flow was lost after %llu bytes: %s\n", (unsigned long long)c->offset, result ? strerror(errno) : "end of file");
    done(1);
}

static void move_bytes(struct client *c)
{
    for (int i = 0; i < 4; i++) {
        ssize_t n = options.mode == 'D' ? recv(c->fd, buffer, CHUNK, 0) : send(c->fd, pattern_at(c->offset), CHUNK, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) return;
        if (n <= 0) lost(c, n);
        moved += (uint64_t)n;
        if (options.mode != 'D' || !options.verify) {
            c->offset += (uint64_t)n;
        } else if (!pattern_matches(&c->offset, buffer, (size_t)n)) {
            fprintf(stderr, "wrong bytes near offset %llu\n", (unsigned long long)c->offset);
            done(3);
        }
        if (n < (ssize_t)CHUNK) return;
    }
}

/* Half-closes, and compares what the server then says that it counted. */
static enum { ARRIVED, WRONG, UNANSWERED } finish_upload(struct client *c)
{
    char text[64];
    size_t got = 0;
    struct pollfd readable = { .fd = c->fd, .events = POLLIN };
    shutdown(c->fd, SHUT_WR);
    while (got < sizeof text - 1 && poll(&readable, 1, 5000) == 1) {
        ssize_t n = recv(c->fd, text + got, sizeof text - 1 - got, 0);
        if (n <= 0) break;
        got += (size_t)n;
    }
    text[got] = 0;
    unsigned long long bytes = 0;
    int wrong = 1;
    if (sscanf(text, "%llu %d", &bytes, &wrong) != 2) return UNANSWERED;
    return !wrong && bytes == c->offset ? ARRIVED : WRONG;
}

static void bulk(void)
{
    struct client *all = make_clients();
    char mode = options.mode == 'U' && options.verify ? 'V' : options.mode;
    int ends[3] = { 0 };
    for (int i = 0; i < options.count; i++)
        if (client_start(&all[i], &options.to)) die("connect");
    double begin = now(), from = 0, time;
    uint64_t before = 0;
    while (time = now(), !from || time - from < options.seconds) {
        if (!from && time - begin >= options.warm_up) from = time, before = moved;
        int count = epoll_wait(epoll_fd, events, BATCH, 100);
        for (int i = 0; i < count; i++) {
            struct client *c = events[i].data.ptr;
            if (c->stage == OPEN) {
                move_bytes(c);
                continue;
            }
            int state = client_step(c, events[i].events);
            if (state < 0) die("a flow did not open");
            if (!state) continue;
            if (send(c->fd, &mode, 1, MSG_NOSIGNAL) != 1) die("send");
            watch_change(c->fd, options.mode == 'D' ? EPOLLIN : EPOLLOUT, c);
        }
    }
    double seconds = time - from;
    uint64_t bytes = moved - before;
    for (int i = 0; i < options.count; i++) {
        if (all[i].stage != OPEN || !all[i].offset) {
            fprintf(stderr, "a flow moved nothing\n");
            done(1);
        }
        if (mode == 'V') ends[finish_upload(&all[i])]++;
    }
    if (ends[WRONG]) fprintf(stderr, "%d of %d uploads arrived with wrong bytes, or not whole\n", ends[WRONG], options.count);
    if (ends[UNANSWERED]) fprintf(stderr, "%d of %d half-closed uploads got no answer\n", ends[UNANSWERED], options.count);
    printf("{\"bytes\": %llu, \"gbps\": %.4f}\n", (unsigned long long)moved, (double)bytes * 8 / seconds / 1e9);
    done(ends[WRONG] ? 3 : ends[UNANSWERED] ? 1 : 0);
}

/* ---- short connections ---- */

static struct {
    long started, through, failed, refused, silent; /* refused and silent: those of the failed that were told so, or nothing at all */
} shorts;

static void short_failed(void)
{
    shorts.failed++;
    if (errno == ECONNREFUSED) shorts.refused++;
}

/* One event of a short connection: 1 when it is through, 0 when not, -1 when it failed. */
static int short_step(struct client *c, uint32_t happened)
{
    static const char request[MESSAGE] = { 'R' };
    if (c->stage != OPEN) {
        errno = 0;
        int state = client_step(c, happened);
        if (state <= 0) return state;
        if (send(c->fd, request, MESSAGE, MSG_NOSIGNAL) != MESSAGE) return -1;
        watch_change(c->fd, EPOLLIN, c);
        return 0;
    }
    ssize_t n = recv(c->fd, buffer, MESSAGE, 0);
    if (n <= 0) return n < 0 && errno == EAGAIN ? 0 : -1;
    c->got += (size_t)n;
    return c->got >= MESSAGE;
}

/* How many are to have been started by now. */
static long short_due(double running)
{
    long due = options.total ? options.total : LONG_MAX;
    if (options.rate) {
        double by_rate = (double)options.rate * (running < options.seconds || options.total ? running : options.seconds);
        if (by_rate < (double)due) due = (long)by_rate;
    }
    return due;
}

/* Without a line's end: more may follow. */
static void tell_shorts(double seconds, double rate)
{
    printf("{\"seconds\": %.1f, \"total\": %ld, \"errors\": %ld, \"refused\": %ld, \"silent\": %ld, \"rate\": %.1f", seconds, shorts.through,
        shorts.failed, shorts.refused, shorts.silent, rate);
}

/* Gives up connections that take too long. */
static void end_silent(struct client *all, struct client **unused, int *free_count, double time)
{
    for (struct client *c = all; c < all + options.count; c++) {
        if (c->fd < 0 || time - c->started <= PATIENCE) continue;
        close(c->fd);
        c->fd = -1;
        shorts.failed++;
        shorts.silent++;
        unused[(*free_count)++] = c;
    }
}

static void conns(void)
{
    struct client *all = make_clients(), **unused = calloc((size_t)options.count, sizeof *unused);
    int free_count = options.count, drains = options.rate || options.total;
    if (!unused) die("calloc");
    for (int i = 0; i < options.count; i++) unused[i] = &all[i], all[i].fd = -1;
    double begin = now(), from = 0, looked = begin, told = begin, time;
    for (;;) {
        time = now();
        if (!from && time - begin >= options.warm_up) from = time, sampled = 0;
        int over = options.total ? shorts.started >= options.total : from && time - from >= options.seconds;
        if (over && (!drains || free_count == options.count)) break;
        if (time - looked > 0.2) {
            looked = time;
            end_silent(all, unused, &free_count, time);
        }
        if (options.progress && time - told >= 1) {
            tell_shorts(time - begin, (double)shorts.through / (time - begin));
            printf("}\n");
            fflush(stdout);
            told = time;
        }
        for (long due = short_due(time - begin); !(over && drains) && free_count && shorts.started < due; shorts.started++) {
            errno = 0;
            if (!client_start(unused[free_count - 1], &options.to)) {
                free_count--;
                continue;
            }
            short_failed();
            shorts.started++;
            break; /* the kernel refuses; others have their turn first */
        }
        int count = epoll_wait(epoll_fd, events, BATCH, options.rate ? 1 : 50);
        for (int i = 0; i < count; i++) {
            struct client *c = events[i].data.ptr;
            int state = short_step(c, events[i].events);
            if (!state) continue;
            if (state > 0) {
                shorts.through++;
                keep_sample(now() - c->started);
            } else short_failed();
            close(c->fd);
            c->fd = -1;
            unused[free_count++] = c;
        }
    }
    double rate = (double)sampled / (time - from);
    sort_samples();
    tell_shorts(time - begin, rate);
    printf(", \"p50\": %.0f, \"p99\": %.0f}\n", percentile(0.5), percentile(0.99));
    done(0);
}

/* ---- idle connections ---- */

/* Sends a byte or takes in its answer: 1 when the connection has been used, 0 when not yet, -1 when it failed. */
static int idle_step(struct client *c, uint32_t happened)
{
    char byte = 'I';
    if (c->stage == OPEN) {
        ssize_t n = recv(c->fd, &byte, 1, 0);
        if (n < 0 && errno == EAGAIN) return 0;
        return n == 1 && byte == 'i' ? 1 : -1;
    }
    int state = client_step(c, happened);
    if (state <= 0) return state;
    if (send(c->fd, &byte, 1, MSG_NOSIGNAL) != 1) return -1;
    watch_change(c->fd, EPOLLIN, c);
    return 0;
}

/* Takes in answers until `wanted` connections have been used or for 10 s nothing came; opens up to `more` others meanwhile. */
static int use_idle(struct client *all, int wanted, int opening)
{
    int used = 0, failed = 0, next = 0;
    double last = now();
    while (used + failed < wanted && now() - last < 10) {
        for (; opening && next < wanted && next - used - failed < OPENING; next++)
            if (client_start(&all[next], &options.to)) failed++;
        int count = epoll_wait(epoll_fd, events, BATCH, 100);
        for (int i = 0; i < count; i++) {
            struct client *c = events[i].data.ptr;
            int state = idle_step(c, events[i].events);
            if (!state) continue;
            last = now();
            epoll_ctl(epoll_fd, EPOLL_CTL_DEL, c->fd, NULL);
            if (state > 0) used++;
            else {
                failed++;
                close(c->fd);
                c->fd = -1;
            }
        }
    }
    return used;
}

static void idle(void)
{
    struct client *all = make_clients();
    char byte;
    double begin = now();
    int open = use_idle(all, options.count, 1), asked = 0;
    printf("{\"open\": %d, \"seconds\": %.2f}\n", open, now() - begin);
    fflush(stdout);
    while (read(STDIN_FILENO, &byte, 1) > 0) continue;
    for (int i = 0; i < options.count; i++) {
        if (all[i].fd < 0 || all[i].stage != OPEN || send(all[i].fd, "I", 1, MSG_NOSIGNAL) != 1) continue;
        watch_add(all[i].fd, EPOLLIN, &all[i]);
        asked++;
    }
    printf("{\"alive\": %d}\n", use_idle(all, asked, 0));
    done(0);
}

/* ---- one connection ---- */

static void ping(void)
{
    struct client *c = make_clients();
    static const char message[MESSAGE] = { 'R' };
    client_open(c, &options.to);
    double end = now() + options.seconds;
    while (now() < end) {
        double start = now();
        size_t half = options.split ? MESSAGE / 2 : MESSAGE;
        if (send(c->fd, message, half, MSG_NOSIGNAL) != (ssize_t)half) die("send");
        if (options.split && send(c->fd, message + half, MESSAGE - half, MSG_NOSIGNAL) != (ssize_t)(MESSAGE - half)) die("send");
        for (size_t got = 0; got < MESSAGE;) {
            ssize_t n = recv(c->fd, buffer, MESSAGE - got, 0);
            if (n <= 0) lost(c, n);
            got += (size_t)n;
        }
        keep_sample(now() - start);
        if (options.gap) usleep((useconds_t)options.gap);
    }
    sort_samples();
    printf("{\"count\": %zu, \"p50\": %.1f, \"p99\": %.1f}\n", sampled, percentile(0.5), percentile(0.99));
    done(0);
}

static void origin(void)
{
    struct client *c = make_clients();
    char text[64] = "";
    client_open(c, &options.to);
    if (send(c->fd, "W", 1, MSG_NOSIGNAL) != 1 || recv(c->fd, text, sizeof text - 1, 0) <= 0) die("origin");
    text[strcspn(text, "\n")] = 0;
    printf("{\"origin\": \"%s\"}\n", text);
    done(0);
}

static void try_open(void)
{
    struct client *c = make_clients();
    const char *result = "silent";
    struct epoll_event event;
    int state = 0;
    if (client_start(c, &options.to)) die("connect");
    while (!state && epoll_wait(epoll_fd, &event, 1, 5000) == 1) state = client_step(c, event.events);
    if (state < 0) result = errno == ECONNREFUSED ? "refused" : "failed";
    if (state > 0) {
        struct pollfd readable = { .fd = c->fd, .events = POLLIN };
        result = poll(&readable, 1, 5000) == 1 && recv(c->fd, buffer, 1, 0) <= 0 ? "closed" : "open";
    }
    printf("{\"result\": \"%s\", \"ms\": %.2f}\n", result, (now() - c->started) * 1e3);
    done(0);
}

static void take_proxy(const char *text)
{
    const char *address = strchr(text, ':');
    if (!address) exit(2);
    options.to.way = text[0] == 'h' ? HTTP : SOCKS5;
    options.to.proxy = parse_address(address + 1);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } commands[] = { { "bulk", bulk }, { "conns", conns }, { "idle", idle }, { "ping", ping }, { "open", try_open }, { "origin", origin } };
    int option;
    while ((option = getopt(argc, argv, "t:x:T:n:d:w:m:vsg:c:r:p")) != -1) switch (option) {
        case 't': options.to.target = parse_address(optarg); break;
        case 'x': take_proxy(optarg); break;
        case 'T': options.to.targets = (unsigned)atoi(optarg); break;
        case 'n': options.count = atoi(optarg); break;
        case 'd': options.seconds = atof(optarg); break;
        case 'w': options.warm_up = atof(optarg); break;
        case 'm': options.mode = *optarg; break;
        case 'v': options.verify = 1; break;
        case 's': options.split = 1; break;
        case 'g': options.gap = atoi(optarg); break;
        case 'c': options.total = atol(optarg); break;
        case 'r': options.rate = atol(optarg); break;
        case 'p': options.progress = 1; break;
        default: return 2;
        }
    if (optind != argc - 1 || options.count < 1 || !options.to.targets || !options.to.target.sin_port) {
        fprintf(stderr, "usage: see the head of load.c\n");
        return 2;
    }
    prepare_process();
    make_pattern();
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        if (!strcmp(argv[optind], commands[i].name)) commands[i].run();
    return 2;
}
