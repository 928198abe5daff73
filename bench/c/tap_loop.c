/* The least that can be done between two TAPs: poll, read from one, rewrite the MAC addresses, write to the other.
 *
 *     tap_loop NAMESPACE-A NAMESPACE-B VIRTIO
 *
 * makes eth0 in both namespaces (given as paths), prints "ready" when they exist, and runs until it is killed. VIRTIO 1:
 * frames carry a virtio header, and checksums and segments are left unfinished, as between our pods.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/if_tun.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define OFFLOADS 0x67 /* CSUM, TSO4, TSO6, USO4, USO6 */
#define BURST 64

struct tap {
    int fd;
    unsigned char mac[6];
};

static void must(int ok, const char *what)
{
    if (ok)
        return;
    perror(what);
    exit(1);
}

static struct tap open_tap(const char *path, int virtio)
{
    struct ifreq request = {.ifr_flags = IFF_TAP | IFF_NO_PI | (virtio ? IFF_VNET_HDR : 0)};
    struct tap tap;
    int namespace = open(path, O_RDONLY);
    must(namespace >= 0 && setns(namespace, CLONE_NEWNET) == 0, path);
    close(namespace);
    strcpy(request.ifr_name, "eth0");
    tap.fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    must(tap.fd >= 0 && ioctl(tap.fd, TUNSETIFF, &request) == 0, "TUNSETIFF");
    must(!virtio || ioctl(tap.fd, TUNSETOFFLOAD, OFFLOADS) == 0, "TUNSETOFFLOAD");
    int sock = socket(AF_INET, SOCK_DGRAM, 0);
    must(sock >= 0 && ioctl(sock, SIOCGIFHWADDR, &request) == 0, "SIOCGIFHWADDR");
    close(sock);
    memcpy(tap.mac, request.ifr_hwaddr.sa_data, 6);
    return tap;
}

static void forward(const struct tap *from, const struct tap *to, int header)
{
    static unsigned char frame[65536 + 256];
    for (int i = 0; i < BURST; i++) {
        ssize_t length = read(from->fd, frame, sizeof frame);
        if (length < header + 14)
            return;
        memcpy(frame + header, to->mac, 6);
        memset(frame + header + 6, 0xee, 6);
        if (write(to->fd, frame, length) < 0)
            continue; /* as our node: the frame is lost, the loop goes on */
    }
}

int main(int argc, char **argv)
{
    must(argc == 4, "usage: tap_loop NAMESPACE-A NAMESPACE-B VIRTIO");
    int virtio = atoi(argv[3]);
    struct tap taps[2] = {open_tap(argv[1], virtio), open_tap(argv[2], virtio)};
    struct pollfd ready[2] = {{.fd = taps[0].fd, .events = POLLIN}, {.fd = taps[1].fd, .events = POLLIN}};
    puts("ready");
    fflush(stdout);
    while (poll(ready, 2, -1) >= 0)
        for (int i = 0; i < 2; i++)
            if (ready[i].revents & POLLIN)
                forward(&taps[i], &taps[1 - i], virtio ? 10 : 0);
    return 0;
}
