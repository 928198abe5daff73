"""A burst of packets: bytes in one arena, one record per packet beside them.

The arena is a flat ``uint8`` array with three regions of slots. A *small* slot holds one MTU-sized frame, a *super*
slot a frame of up to 64 KiB (TSO/GSO), an *assembly* slot a datagram in reassembly. Every slot begins with
``HEADROOM`` bytes, so that the tunnel's headers and the virtio header are written in front of the frame, in place:
3-14 times cheaper than a copy. A stride that is a power of two costs 8-20 % (all headers in one cache set), hence the
64 bytes more.

All offsets in a record (``start``, ``l3``, ``l4``) count from the start of the arena. Addresses, ports and MACs are
host integers; an IPv4 address is ::ffff:a.b.c.d, so ``*_hi`` is 0 and ``*_lo`` is 0xffff_aabb_ccdd.
"""

from dataclasses import dataclass

import numpy as np

from dataplane.jit import Array
from dataplane.verdict import REASONS

HEADROOM = 128  # Ethernet 14 + IPv6 40 + UDP 8 + VXLAN 8 = 70, + virtio header 12, rounded up to cache lines
SMALL_SIZE = 2048
SMALL_STRIDE = SMALL_SIZE + HEADROOM + 64
SUPER_SIZE = 65536 + 256  # the largest IP packet + inner and outer link headers
SUPER_STRIDE = SUPER_SIZE + HEADROOM + 64
ROWS = 256  # packets per burst
SUPERS = 16  # super-frames per burst
ASSEMBLIES = 256  # datagrams in reassembly: 16 MiB, touched only when used (Linux: 4 MiB of buffers)

SUPER_BASE = ROWS * SMALL_STRIDE
ASSEMBLY_BASE = SUPER_BASE + SUPERS * SUPER_STRIDE
ARENA_SIZE = ASSEMBLY_BASE + ASSEMBLIES * SUPER_STRIDE

V4_PREFIX = 0xFFFF_0000_0000  # the low half of ::ffff:0:0

# Flags of a packet's record.
IPV6 = 0x0001
FRAGMENT = 0x0002  # one piece of a datagram; ports are known only in the first
REASSEMBLED = 0x0004  # a whole datagram made of fragments; the largest one's size is in ``max_fragment``
INJECTED = 0x0008  # made or released by the slow path, not received: no guard, no TTL decrement
TUNNELED = 0x0010  # came out of a VXLAN tunnel
ENCAPSULATED = 0x0020  # ``start`` points to the outer Ethernet header
OWES_ERROR = 0x0040  # the slow path sends an ICMP error for this dropped packet
DONT_FRAGMENT = 0x0080
RELATED = 0x0100  # an ICMP error about the flow
WAITED = 0x0200  # injected, but not made here: it was received, and has waited for its neighbor

# virtio_net_hdr.flags and .gso_type (virtio 1.2, 5.1.6)
NEEDS_CSUM = 1
DATA_VALID = 2
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_UDP_L4 = 5
GSO_TCPV6 = 4
GSO_ECN = 0x80

PACKET = np.dtype(
    {
        "names": [
            "start", "length", "l3", "l4", "src_hi", "src_lo", "dst_hi", "dst_lo",
            "sport", "dport", "protocol", "ttl", "tos", "tcp_flags", "iif", "oif", "verdict", "reason", "flags",
            "mark", "flow", "route", "vtep", "vnet_flags", "gso_type", "hdr_len", "gso_size", "csum_start",
            "csum_offset", "ethertype", "slot", "size", "max_fragment", "fragment", "mtu", "next_hi", "next_lo",
        ],
        "formats": [
            "i4", "i4", "i4", "i4", "u8", "u8", "u8", "u8",
            "u2", "u2", "u1", "u1", "u1", "u1", "u2", "u2", "u1", "u1", "u2",
            "u4", "i4", "i4", "i4", "u1", "u1", "u2", "u2", "u2", "u2",
            "u2", "i4", "i4", "u2", "u2", "i4", "u8", "u8",
        ],
        "offsets": [
            0, 4, 8, 12, 16, 24, 32, 40,
            48, 50, 52, 53, 54, 55, 56, 58, 60, 61, 62,
            64, 68, 72, 76, 80, 81, 82, 84, 86, 88,
            90, 92, 96, 100, 102, 108, 112, 120,
        ],
        "itemsize": 128,
    }
)  # fmt: skip
"""One packet, two cache lines; the first has what nearly every stage reads.

=================  ====================================================================================================
start, length      the frame: offset of its first byte in the arena, and bytes (Ethernet header included)
l3, l4             offsets of the IP header and of the transport header (0: none)
src_*, dst_*       128-bit addresses, two 64-bit halves
sport, dport       ports; of an ICMP query the id, and the request's type << 8 where a server's port would be
iif, oif           interface rows (``tables/interface.py``); 0 is none
flow               the flow's row * 2 + direction (``tables/flow.py``); -1 is none
route, vtep        rows of the tables; -1 is none
vnet_flags ...     the virtio header; ``csum_start`` counts from ``start``
slot, size         the slot's first byte and its bytes: a frame never leaves [slot, slot + size)
max_fragment       of a reassembled datagram: the largest fragment's IP length
fragment           IPv4: the flags and offset word of the header
next_hi, next_lo   the next hop's address on the egress link
=================  ====================================================================================================
"""


@dataclass(frozen=True, slots=True)
class Batch:
    """The buffers of one burst; the one owner of every address that a kernel holds (P7).

    Attributes:
        data: ``(ARENA_SIZE,)`` uint8.
        packets: ``(ROWS,)`` of ``PACKET``.
    """

    data: Array
    packets: Array

    @property
    def arrays(self) -> tuple[Array, Array]:
        """What a stage takes as its first argument."""
        return self.data, self.packets


def make_batch() -> Batch:
    """Allocate a batch; pages are touched as they are first used."""
    return Batch(np.zeros(ARENA_SIZE, np.uint8), np.zeros(ROWS, PACKET))


# What a stage takes as its third argument: ``tables``, a plain tuple (NamedTuples cost 5 us a call), in this order.
INTERFACE_TABLE = 0  # (INTERFACES,) of INTERFACE
COUNTERS = 1  # (COUNTER_COUNT,) uint64: packets by reason, then what is below
SETTINGS = 2  # (SETTING_COUNT,) uint64, indexed by NODE_LO and what follows it
ROUTES = 3  # tables.route.RouteTable.arrays
NEIGHBOURS = 4  # tables.neighbour.NeighbourTable.arrays
VTEPS = 5  # tables.vtep.VtepTable.arrays
ASSEMBLY = 6  # stages.defrag: (contexts, bitmap)
FLOWS = 7  # tables.flow.FlowTable.arrays
SERVICES = 8  # tables.service.ServiceTable.arrays
POLICIES = 9  # tables.policy.PolicyTable.arrays: what kube-proxy's rules add to a service
TEMPLATES = 10  # tables.persistence.TemplateTable.arrays
TIMEOUTS = 11  # (TIMEOUT_COUNT,) int64 ns, indexed by tables.flow.Timeout

RECEIVED = REASONS  # counters: packets read from devices
INJECTED_TOTAL = REASONS + 1  # packets made by the slow path, or given back by a stage that had held them
ERRORS_LIMITED = REASONS + 2  # ICMP errors owed but not sent, because of the rate limit
ERROR_TOKENS = REASONS + 3  # ICMP errors that may be sent now
ERROR_REFILLED = REASONS + 4  # when that was last topped up, ns
EMITTED = REASONS + 5  # datagrams of this burst that lie in assembly slots
COUNTER_COUNT = REASONS + 32

NODE_LO = 0  # the node's own address, low half: source of the tunnel's outer packets
GATEWAY_LO = 1  # 169.254.1.1, the low half of its 128 bits
VTEP_MAC = 2
VNI = 3
TUNNEL_PORT = 4
TUNNEL_PORT_LOW = 5  # outer UDP source ports are taken from [low, high)
TUNNEL_PORT_HIGH = 6
POD_MTU = 7
PROXY_ARP = 8  # whether pods get answers for more than the gateway
HOST_INTERFACE = 9  # interface row of the host's own device (dp0); 0: none, the slow path answers for the node
TUNNEL_LO = 10  # the tunnel's own address, low half: what is masqueraded into the tunnel; 0: none
MASQUERADE_LOW = 11  # source ports for masquerading are taken from [low, high]; 0: by the kernel's port classes
MASQUERADE_HIGH = 12
MASQUERADE_ALL = 13  # kube-proxy's masqueradeAll
NAT_OUTGOING = 14  # IPPool.spec.natOutgoing
NAT_RANDOM = 15  # natOutgoing takes a random port at once (iptables --random-fully)
TCP_LIBERAL = 16  # nf_conntrack_tcp_be_liberal: segments outside the window are counted, not dropped
TCP_LOOSE = 17  # nf_conntrack_tcp_loose: connections are picked up in the middle
UPLINK_OWN = 18  # the uplink is ours alone: the host's stack has no address on it
ROUTE_GENERATION = 19  # changes with every edit of routes or addresses
ANNOUNCE_UNTIL = 20  # when this node stops to answer for addresses that others may take, ns; 0: never
SETTING_COUNT = 32
