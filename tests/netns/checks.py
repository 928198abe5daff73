"""What must work between any two pods, however they are connected: real programs, and what they say.

Each function runs a program in one pod against another and asserts on its output; none has a retry, since a packet that
is lost on an idle link of this machine is a fault.
"""

import re
import subprocess
from pathlib import Path

from tests.netns.harness import Namespace

PORT = 5001
MEGABYTES = 100 * 1000 * 1000
GATEWAY = "169.254.1.1"
GATEWAY_MAC = "ee:ee:ee:ee:ee:ee"
DATAGRAMS = [
    1,
    2,
    3,
    100,
    1421,
    1422,
    1423,
    1424,
    1472,
    1473,
    2844,
    2845,
    4000,
    8192,
    16384,
    32768,
    65000,
    65506,
    65507,
]


def gateway_answers_arp(pod: Namespace, count: int = 3) -> None:
    """The address that nobody has is answered with the MAC that everybody has, at once and only once."""
    output = pod.run("arping", "-i", "eth0", "-c", count, "-W", 0.05, GATEWAY)
    assert output.count(f"bytes from {GATEWAY_MAC} ({GATEWAY})") == count, output
    assert f"{count} packets received,   0% unanswered (0 extra)" in output, output


def ping(source: Namespace, target: str, count: int = 10, size: int = 56) -> None:
    """No echo is lost, and none comes twice.

    Adaptive: the next request follows the reply. With a fixed interval a ping that is not scheduled for a moment finds
    three replies of 64 KiB, and its own socket, which holds two, has dropped one (/proc/net/raw).
    """
    output = source.run("ping", "-n", "-c", count, "-A", "-W", 1, "-s", size, target, check=False)
    whole = f"{count} packets transmitted, {count} received, 0% packet loss" in output
    assert whole, output + source.run("cat", "/proc/net/snmp", "/proc/net/raw", "/proc/net/dev")
    assert "DUP!" not in output, output


def tcp(client: Namespace, server: Namespace, address: str, size: int = MEGABYTES) -> None:
    """A transfer in each direction of one connection arrives unchanged."""
    listener = server.spawn(*server.tool("tcp", "listen", PORT, size))
    listener.expect("ready")
    output = client.run(*client.tool("tcp", "connect", address, PORT, size), timeout=120)
    assert listener.wait() == 0, listener.output
    here, there = _digests(output), _digests(listener.output)
    assert here["sent"] == there["received"], (output, listener.output)
    assert here["received"] == there["sent"], (output, listener.output)


def _digests(output: str) -> dict[str, str]:
    return dict(re.findall(r"(sent|received) ([0-9a-f]{64})", output))


def udp(client: Namespace, server: Namespace, address: str, sizes: list[int] | None = None) -> None:
    """Datagrams of every size arrive and return unchanged, in one packet or in fragments."""
    wanted = sizes or DATAGRAMS
    listener = server.spawn(*server.tool("udp", "listen", PORT))
    listener.expect("ready")
    try:
        output = client.run(*client.tool("udp", "connect", address, PORT, *wanted), timeout=120)
    finally:
        listener.stop()
    assert output == "".join(f"{size} ok\n" for size in wanted), output


def too_big_is_reported(source: Namespace, target: str, mtu: int, reporter: str) -> None:
    """A packet over the MTU that may not be fragmented gives ICMP 3/4 with the MTU, from a router.

    The pod's own link is widened for it, so that the kernel of the pod lets the packet out.
    """
    source.ip("link", "set", "eth0", "mtu", mtu + 100)
    try:
        output = source.run("ping", "-n", "-c", 1, "-W", 2, "-M", "do", "-s", mtu - 28 + 1, target, check=False)
    finally:
        source.ip("link", "set", "eth0", "mtu", mtu)
        source.ip("route", "flush", "cache")
    assert f"From {reporter} icmp_seq=1 Frag needed and DF set (mtu = {mtu})" in output, output


def hops(source: Namespace, target: str, *options: str) -> list[str]:
    """Return the addresses that answer traceroute, hop by hop.

    One probe at a time: with sixteen in flight most would reach the target, whose kernel answers six at once and then
    one a second (``icmp_ratelimit``).
    """
    output = source.run("traceroute", "-n", "-q", 1, "-N", 1, "-w", 2, "-m", 8, *options, target)
    return re.findall(r"^ *\d+ +([\d.*]+)", output, re.MULTILINE)


# Linux's skb_checksum_help() writes 0xffff for a sum of 0 whatever the protocol, once in 65536 segments.
OF_THE_KERNEL = "TCP Checksum 0xffff instead of 0x0000"


def nothing_is_malformed(capture: Path, at_least: int, except_for: str = "") -> None:
    """Wireshark decodes a capture of so many frames without a complaint, with every checksum checked."""
    expert = _tshark(capture, "-q", "-z", "expert,warn")
    found = re.findall(r"^.*(?:[Mm]alformed|[Cc]hecksum|[Tt]runcated|[Bb]ogus).*$", expert, re.MULTILINE)
    assert [line for line in found if not except_for or except_for not in line] == [], expert
    frames = _tshark(capture, "-T", "fields", "-e", "frame.number").splitlines()
    assert len(frames) >= at_least, f"{len(frames)} frames in {capture}"


def fields(capture: Path, expression: str, *names: str) -> list[list[str]]:
    """Return fields of the frames that a Wireshark display filter matches."""
    wanted = [word for name in names for word in ("-e", name)]
    return [line.split("\t") for line in _tshark(capture, "-Y", expression, "-T", "fields", *wanted).splitlines()]


def _tshark(capture: Path, *arguments: str) -> str:
    verify = [word for name in ("ip", "udp", "tcp") for word in ("-o", f"{name}.check_checksum:TRUE")]
    opaque = [
        word for name in ("udp", "tcp") for word in ("-d", f"{name}.port=={PORT},data")
    ]  # random bytes, no protocol
    command = ["tshark", "-n", "-r", str(capture), *verify, *opaque, *arguments]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, f"{' '.join(command)}:\n{done.stderr}"
    return done.stdout
