"""What became of a packet, and why.

Verdicts are netfilter's. Every packet ends with one verdict and one reason; the reason names the verdict, the stage
that gave it and a line for people, so one array of counters, indexed by reason, holds all there is to count. Always, as
a property test and `show counters` check:

    received + injected = accepted + stolen + queued + dropped
"""

from enum import IntEnum


class Verdict(IntEnum):
    """Netfilter's verdicts: go on; taken over by the stage; left to the slow path; dropped."""

    ACCEPT = 0
    STOLEN = 1
    QUEUE = 2
    DROP = 3


class Reason(IntEnum):
    """Why a packet has its verdict. ``IP_BAD_HDR`` is labelled ``ip.bad-hdr`` for people and metrics."""

    verdict: Verdict
    stage: str
    text: str

    def __new__(cls, value: int, verdict: Verdict, stage: str, text: str) -> "Reason":
        """Make a member that carries what is known about it."""
        member = int.__new__(cls, value)
        member._value_ = value
        member.verdict, member.stage, member.text = verdict, stage, text
        return member

    @classmethod
    def of(cls, value: int) -> "Reason":
        """Return the member with this number, as it stands in a record."""
        return _BY_VALUE[value]

    @property
    def label(self) -> str:
        """The reason's name for people and metrics: ``tunnel.src-not-node``."""
        return self.name.lower().replace("_", ".", 1).replace("_", "-")

    ACCEPTED = 0, Verdict.ACCEPT, "transmit", "sent to a device"

    # Taken over: the stage has answered the packet or keeps its bytes.
    ARP_ANSWERED = 1, Verdict.STOLEN, "arp", "turned into the ARP reply"
    FRAGMENT_HELD = 2, Verdict.STOLEN, "defrag", "kept until its datagram is whole"
    HOST_OWNED = 3, Verdict.STOLEN, "conntrack", "on the shared uplink and meant for the host's own stack"

    # Left to the slow path, which answers, holds or re-injects.
    ARP_LEARN = 8, Verdict.QUEUE, "arp", "tells the address of a neighbor on the uplink"
    NEIGH_RESOLVE = 9, Verdict.QUEUE, "route", "waits until its next hop's address is known"
    LOCAL_DELIVERY = 10, Verdict.QUEUE, "route", "addressed to the node itself"

    # Dropped. The names are those that operators know from conntrack, MetalLB and Cilium.
    L2_TOO_SHORT = 32, Verdict.DROP, "parse", "shorter than its headers say"
    L2_OTHER_MAC = 33, Verdict.DROP, "parse", "sent to the MAC address of another station"
    L2_BAD_ETHERTYPE = 34, Verdict.DROP, "parse", "neither IPv4, IPv6 nor ARP"
    L2_SPOOFED_SRC = 35, Verdict.DROP, "guard", "a pod used a MAC address that is not its own"
    ARP_MALFORMED = 36, Verdict.DROP, "arp", "not Ethernet/IPv4 ARP, or an impossible address in it"
    ARP_NOT_OWNER = 37, Verdict.DROP, "arp", "asks for an address that is not answered on this interface"
    ARP_OWN_IP = 38, Verdict.DROP, "arp", "a pod asks for its own address (duplicate detection): silence is the answer"
    ARP_PROBE = 39, Verdict.DROP, "arp", "an RFC 5227 probe for an address that is only proxied"
    NEIGH_UNRESOLVED = 40, Verdict.DROP, "slowpath", "the next hop did not answer ARP"
    NEIGH_QUEUE_FULL = 41, Verdict.DROP, "slowpath", "too many packets wait for the same next hop"
    IP_BAD_HDR = 42, Verdict.DROP, "parse", "IP header: version, length or extension headers are wrong"
    IP_BAD_CSUM = 43, Verdict.DROP, "parse", "IPv4 header checksum is wrong"
    IP_TTL = 44, Verdict.DROP, "route", "TTL or hop limit reached zero; ICMP time exceeded is owed"
    IP_FRAG_TIMEOUT = 45, Verdict.DROP, "defrag", "fragments whose datagram was not complete in time"
    IP_FRAG_LIMIT = 46, Verdict.DROP, "defrag", "no room for another datagram in pieces"
    IP_FRAG_OVERLAP = 47, Verdict.DROP, "defrag", "fragments overlap or disagree about the end (RFC 5722)"
    IP_MARTIAN = 48, Verdict.DROP, "guard", "an address that can never be on this link"
    IP_SPOOFED_SRC = 49, Verdict.DROP, "guard", "a pod used an address that is not its own"
    IP_MULTICAST = 50, Verdict.DROP, "guard", "multicast or broadcast is not forwarded"
    ROUTE_NONE = 51, Verdict.DROP, "route", "no route; ICMP network unreachable is owed"
    ROUTE_BLACKHOLE = 52, Verdict.DROP, "route", "an address of the node's own block that no pod has"
    ROUTE_UNREACHABLE = 53, Verdict.DROP, "route", "an unreachable route; ICMP host unreachable is owed"
    MTU_DF = 54, Verdict.DROP, "route", "larger than the next link's MTU with DF set; ICMP 3/4 is owed"
    TUNNEL_BAD_FLAGS = 55, Verdict.DROP, "vxlan", "the VXLAN I flag is not set"
    TUNNEL_RESERVED = 56, Verdict.DROP, "vxlan", "a reserved VXLAN bit is set"
    TUNNEL_VNI = 57, Verdict.DROP, "vxlan", "an unknown VXLAN network identifier"
    TUNNEL_SRC_NOT_NODE = 58, Verdict.DROP, "vxlan", "VXLAN from an address that is no node of the cluster"
    TUNNEL_OWN_MAC = 59, Verdict.DROP, "vxlan", "the inner source MAC is this node's own VTEP"
    TUNNEL_INNER_MAC = 60, Verdict.DROP, "vxlan", "the inner destination MAC is another VTEP's"
    TUNNEL_ECN = 61, Verdict.DROP, "vxlan", "outer CE on an inner packet that is not ECN capable (RFC 6040)"
    TUNNEL_CSUM = 62, Verdict.DROP, "vxlan", "the outer UDP checksum is wrong"
    TUNNEL_NO_VTEP = 63, Verdict.DROP, "route", "the remote node's VTEP is not known"
    TUNNEL_FROM_POD = 64, Verdict.DROP, "guard", "a pod sent an encapsulated packet"
    TUNNEL_TRUNCATED = 65, Verdict.DROP, "vxlan", "the VXLAN datagram ends before its inner frame"
    DEVICE_DOWN = 66, Verdict.DROP, "transmit", "the device it should leave by is down or gone"
    DEVICE_ERROR = 67, Verdict.DROP, "transmit", "the device refused it"
    OVERLOAD_TX_FULL = 68, Verdict.DROP, "transmit", "the device's queue is full"
    OVERLOAD_RX_RING = 69, Verdict.DROP, "receive", "lost by the kernel before the dataplane could read it"
    OVERLOAD_SLOW_PATH = 70, Verdict.DROP, "slowpath", "too many packets wait for the slow path"
    LOCAL_NO_LISTENER = (
        71,
        Verdict.DROP,
        "slowpath",
        "nothing on the node listens there; ICMP port unreachable is owed",
    )
    SVC_NO_ENDPOINTS = 72, Verdict.DROP, "service", "a service without a usable backend; ICMP port unreachable is owed"
    SVC_NO_LOCAL_ENDPOINTS = 73, Verdict.DROP, "service", "traffic policy Local, and no backend on this node"
    SVC_SOURCE_RANGE = 74, Verdict.DROP, "service", "the client is outside loadBalancerSourceRanges"
    SVC_VIP_CLOSED_PORT = 75, Verdict.DROP, "service", "a service address, but no such port; port unreachable is owed"
    LB_DEST_DELETED = 76, Verdict.DROP, "conntrack", "from a backend that was deleted; its connection is gone"
    CT_INVALID_FLAGS = 77, Verdict.DROP, "conntrack", "TCP flags that no segment has, or a torn transport header"
    CT_NOT_SYN = 78, Verdict.DROP, "conntrack", "of no known connection, and it cannot begin one"
    CT_WINDOW = 79, Verdict.DROP, "conntrack", "a TCP segment outside the window (only with tcpBeLiberal = false)"
    CT_BAD_RST = 80, Verdict.DROP, "conntrack", "a TCP RST that is not the peer's"
    CT_TABLE_FULL = 81, Verdict.DROP, "conntrack", "no room for another flow, and none that may be given up"
    CT_CLASH = 82, Verdict.DROP, "conntrack", "its reply could not be told from another flow's"
    NAT_NO_PORT = 83, Verdict.DROP, "masquerade", "no source port is free for this destination"
    NAT_MASQ_NO_ADDR = 84, Verdict.DROP, "masquerade", "no address to masquerade with"
    ICMP_UNRELATED = 85, Verdict.DROP, "conntrack", "an ICMP error about a packet of no known flow"
    ICMP_BAD_INNER = 86, Verdict.DROP, "conntrack", "an ICMP error that quotes no packet of its receiver's"


REASONS = 128  # numbers that a reason may have; the other counters begin behind them
_BY_VALUE = {reason.value: reason for reason in Reason}
