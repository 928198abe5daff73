/* The two ends of a stream of small UDP datagrams.
 *
 *     udp send ADDRESS PORT BYTES SECONDS    as fast as one thread can; prints how many were sent
 *     udp count PORT SECONDS                 prints "ready", then datagrams per second from the first one on
 *
 * Both end by themselves: `count` also when nothing has come within five seconds. It looks twice a millisecond instead of
 * waiting: a receiver that is woken by each datagram takes turns with a sender on the same core, and then either has a
 * rate of its own, 100 or 300 thousand per second, whatever is between them.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BURST 64
#define ROOM 2048
#define PATIENCE 5.0 /* seconds */

static struct mmsghdr messages[BURST];
static struct iovec pieces[BURST];
static char bytes[BURST][ROOM];

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + now.tv_nsec * 1e-9;
}

static void prepare(size_t length)
{
    for (int i = 0; i < BURST; i++) {
        pieces[i] = (struct iovec){bytes[i], length};
        messages[i].msg_hdr.msg_iov = &pieces[i];
        messages[i].msg_hdr.msg_iovlen = 1;
    }
}

static int send_stream(const char *address, int port, size_t length, double duration)
{
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    int sock = socket(AF_INET, SOCK_DGRAM, 0);
    long sent = 0;
    if (length > ROOM || inet_pton(AF_INET, address, &to.sin_addr) != 1 || connect(sock, (void *)&to, sizeof to) < 0)
        return perror("send"), 1;
    prepare(length);
    for (double end = seconds() + duration; seconds() < end;) {
        int done = sendmmsg(sock, messages, BURST, 0);
        sent += done > 0 ? done : 0; /* a full queue is what we are here for */
    }
    printf("%ld\n", sent);
    return 0;
}

static int count_stream(int port, double duration)
{
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_port = htons(port)};
    int sock = socket(AF_INET, SOCK_DGRAM, 0), room = 8 << 20;
    setsockopt(sock, SOL_SOCKET, SO_RCVBUFFORCE, &room, sizeof room);
    if (bind(sock, (void *)&here, sizeof here) < 0)
        return perror("bind"), 1;
    prepare(ROOM);
    puts("ready");
    fflush(stdout);
    long received = 0;
    double begin = 0, now = seconds(), patience = now + PATIENCE;
    while (begin == 0 ? now < patience : now - begin < duration) {
        int got = recvmmsg(sock, messages, BURST, MSG_DONTWAIT, NULL);
        now = seconds();
        if (got > 0 && begin == 0)
            begin = now;
        else if (got > 0)
            received += got;
        if (got < BURST)
            usleep(500);
    }
    printf("%.0f\n", received / duration);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 6 && !strcmp(argv[1], "send"))
        return send_stream(argv[2], atoi(argv[3]), atoi(argv[4]), atof(argv[5]));
    if (argc == 4 && !strcmp(argv[1], "count"))
        return count_stream(atoi(argv[2]), atof(argv[3]));
    fprintf(stderr, "usage: udp send ADDRESS PORT BYTES SECONDS | udp count PORT SECONDS\n");
    return 2;
}
