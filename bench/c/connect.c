/* Short TCP connections as fast as they can be made, and round trips on one that stays.
 *
 *     connect serve PORT                               answers every byte; ends by SIGTERM
 *     connect load ADDRESS PORT PARALLEL SECONDS fin   prints "connections per second, failures"
 *     connect load ADDRESS PORT PARALLEL SECONDS rst
 *     connect trips ADDRESS PORT COUNT                 prints the round trips' median and 99th percentile in us
 *
 * A client connects, sends one byte, waits for one byte, and the connection ends: by the server's FIN (as an HTTP/1.0
 * server does it; the byte 'c' asks for that, and the server keeps the TIME_WAIT) or by the client's RST ('k': keep).
 * PARALLEL of them are under way at any time. The first WARM_UP seconds are not counted.
 *
 * Source ports go around from FIRST_PORT to LAST_PORT, chosen here: the kernel's own search for a free one takes longer
 * than a connection when many are in use. So a port comes back after some seconds, within the time that connection
 * tracking remembers it: what is between the two ends has to take a SYN for a closed connection as a new one.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define FIRST_PORT 1024
#define LAST_PORT 65535
#define EVENTS 256
#define MOST 4096 /* descriptors */
#define WARM_UP 0.3
#define PATIENCE 5.0 /* seconds until a connection counts as failed */

enum state { CLOSED, CONNECTING, ASKED, ANSWERED };

struct slot {
    enum state state;
    double since;
};

static struct slot slots[MOST]; /* by descriptor */
static struct sockaddr_in target;
static int poller, next_port = FIRST_PORT, reset;
static long done, failed;

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static void die(const char *why)
{
    perror(why);
    exit(1);
}

static void resolve(const char *address, int port)
{
    target = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
    if (inet_pton(AF_INET, address, &target.sin_addr) != 1)
        die(address);
}

/* --- the server --- */

static void serve(int port)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), one = 1;
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one); /* inherited */
    if (bind(listener, (void *)&here, sizeof here) < 0 || listen(listener, 4096) < 0)
        die("listen");
    poller = epoll_create1(0);
    struct epoll_event events[EVENTS], event = {EPOLLIN, {.fd = listener}};
    epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event);
    puts("ready");
    fflush(stdout);
    for (;;) {
        int count = epoll_wait(poller, events, EVENTS, -1);
        for (int i = 0; i < count; i++) {
            int sock = events[i].data.fd;
            if (sock == listener) {
                while ((sock = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
                    event = (struct epoll_event){EPOLLIN, {.fd = sock}};
                    epoll_ctl(poller, EPOLL_CTL_ADD, sock, &event);
                }
                continue;
            }
            char byte;
            ssize_t got = recv(sock, &byte, 1, 0);
            if (got < 0 && errno == EAGAIN)
                continue;
            if (got != 1 || send(sock, &byte, 1, MSG_NOSIGNAL) != 1 || byte == 'c')
                close(sock);
        }
    }
}

/* --- the clients --- */

static void begin(double now)
{
    struct sockaddr_in here = {.sin_family = AF_INET};
    int sock = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (sock < 0 || sock >= MOST)
        die("socket");
    do { /* a port whose last connection is not quite gone is left out */
        here.sin_port = htons(next_port);
        next_port = next_port == LAST_PORT ? FIRST_PORT : next_port + 1;
    } while (bind(sock, (void *)&here, sizeof here) < 0);
    struct epoll_event event = {EPOLLIN | EPOLLOUT | EPOLLET, {.fd = sock}};
    if (connect(sock, (void *)&target, sizeof target) < 0 && errno != EINPROGRESS)
        die("connect");
    epoll_ctl(poller, EPOLL_CTL_ADD, sock, &event);
    slots[sock] = (struct slot){CONNECTING, now};
}

static void end(int sock, int well, double now)
{
    struct linger at_once = {1, 0};
    if (reset || !well)
        setsockopt(sock, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    close(sock);
    slots[sock].state = CLOSED;
    done += well;
    failed += !well;
    begin(now);
}

static void advance(int sock, double now)
{
    struct slot *slot = &slots[sock];
    if (slot->state == CONNECTING) {
        if (send(sock, reset ? "k" : "c", 1, MSG_NOSIGNAL) != 1) {
            if (errno != EAGAIN)
                end(sock, 0, now);
            return;
        }
        slot->state = ASKED;
    }
    char byte;
    if (slot->state == ASKED) {
        ssize_t got = recv(sock, &byte, 1, 0);
        if (got < 0 && errno == EAGAIN)
            return;
        if (got != 1 || reset)
            return end(sock, got == 1, now);
        slot->state = ANSWERED;
    }
    ssize_t got = recv(sock, &byte, 1, 0);
    if (got < 0 && errno == EAGAIN)
        return;
    end(sock, got == 0, now);
}

static void give_up_late(double now)
{
    for (int sock = 0; sock < MOST; sock++)
        if (slots[sock].state != CLOSED && now - slots[sock].since > PATIENCE)
            end(sock, 0, now);
}

static int load(int parallel, double duration)
{
    struct epoll_event events[EVENTS];
    poller = epoll_create1(0);
    double now = seconds(), start = now + WARM_UP, late = now;
    long before = -1;
    for (int i = 0; i < parallel; i++)
        begin(now);
    while ((now = seconds()) < start + duration) {
        if (before < 0 && now >= start)
            start = now, before = done;
        if (now - late > 1)
            give_up_late(late = now);
        int count = epoll_wait(poller, events, EVENTS, 100);
        for (int i = 0; i < count; i++)
            if (slots[events[i].data.fd].state != CLOSED)
                advance(events[i].data.fd, now);
    }
    printf("%.0f %ld\n", (done - before) / (now - start), failed);
    return 0;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static int trips(int count)
{
    double *times = calloc(count, sizeof *times);
    int sock = socket(AF_INET, SOCK_STREAM, 0), one = 1;
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    if (!times || connect(sock, (void *)&target, sizeof target) < 0)
        die("connect");
    for (int i = -count / 10; i < count; i++) {
        char byte = 'k';
        double begun = seconds();
        if (send(sock, &byte, 1, 0) != 1 || recv(sock, &byte, 1, 0) != 1)
            die("trip");
        if (i >= 0)
            times[i] = (seconds() - begun) * 1e6;
    }
    qsort(times, count, sizeof *times, by_size);
    printf("%.2f %.2f\n", times[count / 2], times[(int)(count * 0.99)]);
    free(times);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 3 && !strcmp(argv[1], "serve"))
        serve(atoi(argv[2]));
    if (argc == 7 && !strcmp(argv[1], "load")) {
        reset = !strcmp(argv[6], "rst");
        resolve(argv[2], atoi(argv[3]));
        return load(atoi(argv[4]), atof(argv[5]));
    }
    if (argc == 5 && !strcmp(argv[1], "trips")) {
        resolve(argv[2], atoi(argv[3]));
        return trips(atoi(argv[4]));
    }
    fprintf(stderr, "usage: connect serve PORT | load ADDRESS PORT PARALLEL SECONDS fin|rst | trips ADDRESS PORT COUNT\n");
    return 2;
}
