"""The formats of ipvsadm and conntrack.

The ipvsadm texts are what ipvsadm 1.31 of Debian 12 printed for these numbers, given to it in place of the kernel's.
"""

import re
import subprocess
from typing import Any

import pytest

from dataplane.control import conntrack, ipvsadm
from tests.fake_node import endpoint, flow, flows, half, service
from tests.spaces import opened_spaces

SIZE = 4096
COUNTERS = ("connections", "in_packets", "out_packets", "in_bytes", "out_bytes")


def counted(*numbers: int) -> dict[str, Any]:
    return dict(zip(COUNTERS, numbers, strict=True))


WEB, SOURCE, MAGLEV, BOTH = ("10.96.0.20", 80), ("10.96.0.3", 443), ("10.96.0.4", 443), ("10.96.0.5", 443)
SERVICES: list[Any] = [
    service("10.96.0.10", 53, protocol="UDP", scheduler_flags=["ops"], **counted(0, 0, 0, 0, 0)),
    service(*WEB, affinity_s=10800, **counted(12, 120, 100, 12000, 100_000_000)),
    service(
        *SOURCE,
        scheduler="sh",
        scheduler_flags=["sh-port", "sh-fallback"],
        **counted(99_999_999, 100_000_000, 999_999_999, 1_000_000_000, 99_999_999_999),
    ),
    service(
        *MAGLEV,
        scheduler="mh",
        scheduler_flags=["mh-port"],
        affinity_s=300,
        mask_bits=24,
        **counted(100_000_000, 999_999_999, 4_294_967_295, 1_234_567_890_123_456, 99_999_999_999_999),
    ),
    service(*BOTH, scheduler="mh", scheduler_flags=["mh-port", "mh-fallback", "ops"], **counted(1, 2, 3, 4, 5)),
]
SIX = counted(6, 60, 50, 6000, 50_000_000)
ENDPOINTS: list[Any] = [
    endpoint(*WEB, "10.244.1.11", 8080, active=1, inactive=0, **SIX),
    endpoint(*WEB, "10.244.1.10", 8080, weight=100, active=0, inactive=12345, **SIX),
    endpoint(*SOURCE, "192.168.100.200", 65535, weight=0, active=1, inactive=2, **counted(1, 2, 3, 4, 123_456_789_012)),
    endpoint(
        "10.96.0.10", 53, "10.244.2.2", 53, protocol="UDP", active=0, inactive=3, **counted(100_000_000, 0, 0, 0, 0)
    ),
]

LIST = """\
IP Virtual Server version 1.2.1 (size=4096)|
Prot LocalAddress:Port Scheduler Flags|
  -> RemoteAddress:Port           Forward Weight ActiveConn InActConn|
TCP  10.96.0.3:443 sh (sh-fallback,sh-port)|
  -> 192.168.100.200:65535        Masq    0      1          2         |
TCP  10.96.0.4:443 mh (mh-port) persistent 300 mask 255.255.255.0|
TCP  10.96.0.5:443 mh (mh-fallback,mh-port) ops|
TCP  10.96.0.20:80 rr persistent 10800|
  -> 10.244.1.10:8080             Masq    100    0          12345     |
  -> 10.244.1.11:8080             Masq    1      1          0         |
UDP  10.96.0.10:53 rr ops|
  -> 10.244.2.2:53                Masq    1      0          3         |
"""

STATS = """\
IP Virtual Server version 1.2.1 (size=4096)|
Prot LocalAddress:Port               Conns   InPkts  OutPkts  InBytes OutBytes|
  -> RemoteAddress:Port|
TCP  10.96.0.3:443                99999999  100000K  999999K    1000M   99999M|
  -> 192.168.100.200:65535               1        2        3        4     123G|
TCP  10.96.0.4:443                 100000K  999999K    4294M    1234T   99999G|
TCP  10.96.0.5:443                       1        2        3        4        5|
TCP  10.96.0.20:80                      12      120      100    12000  100000K|
  -> 10.244.1.10:8080                    6       60       50     6000 50000000|
  -> 10.244.1.11:8080                    6       60       50     6000 50000000|
UDP  10.96.0.10:53                       0        0        0        0        0|
  -> 10.244.2.2:53                 100000K        0        0        0        0|
"""

RATE = """\
IP Virtual Server version 1.2.1 (size=4096)|
Prot LocalAddress:Port                 CPS    InPPS   OutPPS    InBPS   OutBPS|
  -> RemoteAddress:Port|
TCP  10.96.0.20:80                      12      120      100    12000  100000K|
  -> 10.244.1.10:8080                    6       60       50     6000 50000000|
  -> 10.244.1.11:8080                    6       60       50     6000 50000000|
UDP  10.96.0.10:53                       0        0        0        0        0|
  -> 10.244.2.2:53                100000000        0        0        0        0|
"""

CONNECTIONS = """\
IPVS connection entries|
pro expire state       source             virtual            destination|
TCP 179:59 NONE        10.244.1.11:0      10.96.0.20:80      10.244.1.10:8080|
TCP 14:59  ESTABLISHED 10.244.1.11:40000  10.96.0.20:80      10.244.1.10:8080|
UDP 04:59  UDP         10.244.1.11:5000   10.96.0.10:53      10.244.2.2:53|
TCP 00:59  CLOSE_WAIT  192.168.100.100:65000 192.168.100.200:65535 192.168.100.100:65535|
"""


def test_services_are_printed_as_ipvsadm_does():
    assert ipvsadm.services(SERVICES, ENDPOINTS, SIZE) == LIST.replace("|", "")


def test_totals_are_printed_as_ipvsadm_does():
    assert ipvsadm.stats(SERVICES, ENDPOINTS, SIZE) == STATS.replace("|", "")


def test_rates_are_printed_as_ipvsadm_does():
    few = [each for each in SERVICES if each["address"] in ("10.96.0.10", "10.96.0.20")]
    assert ipvsadm.rate(few, ENDPOINTS, SIZE) == RATE.replace("|", "")


def test_ipv6_services_are_printed_in_brackets_and_after_the_others():
    six: Any = service("2001:db8::1", 80, affinity_s=60, mask_bits=64)
    four: Any = service("203.0.113.1", 80)
    text = ipvsadm.services([six, four], [endpoint("2001:db8::1", 80, "2001:db8::2", 8080)], SIZE)  # type: ignore[list-item]
    assert text.splitlines()[3:] == [
        "TCP  203.0.113.1:80 rr",
        "TCP  [2001:db8::1]:80 rr persistent 60 mask 64",
        "  -> [2001:db8::2]:8080           Masq    1      1          0         ",
    ]


def balanced(protocol: str, state: str, left: int, *ends: tuple[str, int]) -> dict[str, Any]:
    client, virtual, backend = ends
    words = {"protocol": protocol, "lb_state": state, "lb_timeout_s": left}
    return flow(half(*client, *virtual), half(*backend, *client), **words)


def test_connections_and_templates_are_printed_as_ipvsadm_does():
    client, web, dns = ("10.244.1.11", 40000), ("10.96.0.20", 80), ("10.96.0.10", 53)
    rows: list[Any] = [
        balanced("tcp", "ESTABLISHED", 899, client, web, ("10.244.1.10", 8080)),
        balanced("udp", "UDP", 299, ("10.244.1.11", 5000), dns, ("10.244.2.2", 53)),
        flows()[1],  # no business of ip_vs
        balanced("tcp", "CLOSE_WAIT", 59, *(("192.168.100.100", 65000), ("192.168.100.200", 65535)),
                 ("192.168.100.100", 65535)),
    ]  # fmt: skip
    template: Any = {
        "client": "10.244.1.11",
        "protocol": "TCP",
        "virtual_address": "10.96.0.20",
        "virtual_port": 80,
        "backend": "10.244.1.10:8080",
        "timeout_s": 10799,
    }
    assert ipvsadm.connections(rows, [template]) == CONNECTIONS.replace("|", "")


def test_rates_are_the_growth_of_the_counters_per_second():
    before = [service(*WEB, **counted(10, 100, 100, 1000, 1000))]
    new = service("10.96.0.99", 80)
    after = [service(*WEB, **counted(30, 100, 101, 3000, 1000)), new]
    rates = ipvsadm.per_second(before, after, 2.0)
    assert [[row[name] for name in COUNTERS] for row in rates] == [[10, 0, 0, 1000, 0], [0, 0, 0, 0, 0]]


# --- conntrack -------------------------------------------------------------------------------------------------------

CONNTRACK = """\
tcp      6 86399 ESTABLISHED src=10.244.1.11 dst=10.96.0.20 sport=40000 dport=80 \
src=10.244.1.10 dst=10.244.1.11 sport=8080 dport=40000 [ASSURED] mark=0 use=1
udp      17 29 src=10.244.1.11 dst=203.0.113.9 sport=5353 dport=53 [UNREPLIED] \
src=203.0.113.9 dst=10.244.1.11 sport=53 dport=5353 mark=0 use=1
icmp     1 30 src=10.244.1.11 dst=203.0.113.9 type=8 code=0 id=77 \
src=203.0.113.9 dst=192.0.2.11 type=0 code=0 id=1024 mark=0 use=1
gre      47 600 src=10.244.1.11 dst=203.0.113.9 srckey=0x0 dstkey=0x0 [UNREPLIED] \
src=203.0.113.9 dst=10.244.1.11 srckey=0x0 dstkey=0x0 mark=0 use=1
"""


def test_flows_are_printed_as_conntrack_does():
    rows: list[Any] = flows()
    assert [conntrack.line(row) for row in rows] == CONNTRACK.splitlines()


def test_extended_lines_have_the_family_and_the_counters():
    rows: list[Any] = flows()
    assert conntrack.line(rows[1], extended=True) == (
        "ipv4     2 udp      17 29 src=10.244.1.11 dst=203.0.113.9 sport=5353 dport=53 packets=1 bytes=60 [UNREPLIED] "
        "src=203.0.113.9 dst=10.244.1.11 sport=53 dport=5353 packets=0 bytes=0 mark=0 use=1"
    )


def test_a_protocol_that_conntrack_has_no_name_for_is_unknown():
    row: Any = flows()[3] | {"protocol": "89", "protocol_number": 89}
    assert conntrack.line(row).startswith("unknown  89 600 src=10.244.1.11 dst=203.0.113.9 [UNREPLIED] src=")


# conntrack(8) in a namespace and we, for the same flows, must both match, and give the same parts.
LINE = re.compile(
    r"(?P<family>ipv4     2 )?(?P<name>[a-z]+ +)(?P<number>\d+) (?P<left>\d+) (?:(?P<state>[A-Z_0-9]+) )?"
    r"src=(?P<src>\S+) dst=(?P<dst>\S+) (?P<ports>(?:\w+=\w+ )*?)(?P<unreplied>\[UNREPLIED\] )?"
    r"src=(?P<reply_src>\S+) dst=(?P<reply_dst>\S+) (?P<reply_ports>(?:(?!mark)\w+=\w+ )*)(?P<assured>\[ASSURED\] )?"
    r"mark=(?P<mark>\d+) use=1"
)
ADDED = (  # what conntrack -I enters, and what we would have for it
    (
        "-p tcp -s 10.244.1.11 -d 10.96.0.20 --sport 40000 --dport 80 -r 10.244.1.10 -q 10.244.1.11"
        " --reply-port-src 8080 --reply-port-dst 40000 --state ESTABLISHED -u ASSURED,SEEN_REPLY -t 86399",
        0,
    ),
    ("-p udp -s 10.244.1.11 -d 203.0.113.9 --sport 5353 --dport 53 -t 29", 1),
    ("-p icmp -s 10.244.1.11 -d 203.0.113.9 --icmp-type 8 --icmp-code 0 --icmp-id 77 -u SEEN_REPLY -t 30", 2),
    (
        "-p gre -s 10.244.1.11 -d 203.0.113.9 --orig-key-src 0 --orig-key-dst 0 --reply-key-src 0 --reply-key-dst 0"
        " -t 600",
        3,
    ),
)


@pytest.mark.netns
@pytest.mark.parametrize(("words", "which"), ADDED)
@pytest.mark.parametrize("extended", [False, True])
def test_our_lines_have_the_form_of_the_kernels(words, which, extended):
    ours: Any = flows()[which]
    if ours["icmp"]:  # untranslated: conntrack -I cannot enter another id
        ours |= {"icmp": ours["icmp"] | {"reply_id": 77}, "reply": ours["reply"] | {"dst": "10.244.1.11"}}
    with opened_spaces() as spaces:
        space = spaces("ct")
        space.write("/proc/sys/net/netfilter/nf_conntrack_acct", str(int(extended)))

        def run(*arguments: str) -> str:
            command = ["ip", "netns", "exec", space.name, "conntrack", *arguments]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        run("-I", *words.split())
        theirs = run("-L", *(("-o", "extended") if extended else ()))
    parts = [LINE.fullmatch(text.rstrip("\n")) for text in (theirs, conntrack.line(ours, extended))]
    assert all(parts), theirs
    known = [part.groupdict() for part in parts if part]
    for words_of in known:
        del words_of["left"]
    if extended:
        assert "packets=0 bytes=0" in known[0]["ports"]
        for words_of in known:
            for side in ("ports", "reply_ports"):
                words_of[side] = re.sub(r"(packets|bytes)=\d+", r"\1=N", words_of[side])
    assert known[0] == known[1]
