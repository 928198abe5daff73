"""Flows as ``conntrack`` (conntrack-tools 1.4) prints them."""

from dataplane.control.snapshot import ConntrackStats, FlowRow, Half

STATS = (
    *("found", "invalid", "insert", "insert_failed", "drop", "early_drop", "error", "search_restart"),
    *("clash_resolve", "chaintoolong"),
)
_NUMBERED = ("icmp", "icmpv6", "tcp", "udp", "sctp", "gre")
_FAMILY = {"ipv4": 2, "ipv6": 10}  # AF_INET, AF_INET6


def line(flow: FlowRow, extended: bool = False) -> str:
    """Return what ``conntrack -L`` prints for a flow.

    Args:
        flow: The flow.
        extended: As ``-o extended`` on a kernel that counts (``nf_conntrack_acct``): with the family and the counters.
    """
    name = flow["protocol"] if flow["protocol"] in _NUMBERED else "unknown"
    words = [f"{flow['family']:<8} {_FAMILY[flow['family']]}"] if extended else []
    words += [f"{name:<8} {flow['protocol_number']} {flow['timeout_s']}"]
    if flow["protocol"] == "tcp":
        words.append(flow["state"])
    original, reply = _ports(flow)
    words += [_half(flow["original"], original, extended)]
    if "SEEN_REPLY" not in flow["status"]:
        words.append("[UNREPLIED]")
    words += [_half(flow["reply"], reply, extended)]
    if "ASSURED" in flow["status"]:
        words.append("[ASSURED]")
    return " ".join([*words, f"mark={flow['mark']}", "use=1"])


def stats(snapshot: ConntrackStats) -> str:
    """Return what ``conntrack -S`` prints; packets are worked on by one thread, so there is one line."""
    return "cpu=0   \t" + "".join(f"{name}={snapshot[name]} " for name in STATS) + "\n"  # type: ignore[literal-required]


def _half(half: Half, ports: str, counters: bool) -> str:
    text = f"src={half['src']} dst={half['dst']}{ports}"
    return f"{text} packets={half['packets']} bytes={half['bytes']}" if counters else text


def _ports(flow: FlowRow) -> tuple[str, str]:
    icmp = flow["icmp"]
    if icmp is not None:
        return (
            f" type={icmp['type']} code={icmp['code']} id={icmp['id']}",
            f" type={icmp['reply_type']} code={icmp['code']} id={icmp['reply_id']}",
        )
    if flow["protocol"] == "gre":  # of version 0, whose keys are not part of the kernel's tuple either
        return (" srckey=0x0 dstkey=0x0",) * 2
    if flow["protocol"] not in ("tcp", "udp", "sctp"):
        return "", ""
    original, reply = flow["original"], flow["reply"]
    return (
        f" sport={original['sport']} dport={original['dport']}",
        f" sport={reply['sport']} dport={reply['dport']}",
    )
