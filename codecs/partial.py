"""Tell an unfinished TCP or UDP checksum from a complete one.

A sender that leaves the checksum to its device stores only the folded pseudo-header sum in the field. Between two
network namespaces no device ever finishes it, and a packet that leaves the kernel through a plain socket has lost the
mark that says so: nothing tells but the stored value itself.

A complete checksum equals that value once in 65536 times. Treating it as unfinished is harmless: what finishing it
computes, ``~fold(stored + the rest)``, is then the stored value again.
"""

from dataplane.codecs import ipv4, ipv6
from dataplane.codecs.checksum import fold, sum16
from dataplane.jit import Array, kernel, load8, load16

COMPLETE = 0  # complete, absent, wrong, or not TCP or UDP
UNFINISHED = 1

_TCP, _UDP = 6, 17
_TCP_HEADER, _UDP_HEADER = 20, 8
_TCP_CHECKSUM, _UDP_CHECKSUM = 16, 6  # where the field is in the header


@kernel
def partial_state(data: Array, l3: int, end: int) -> int:
    """Return ``UNFINISHED`` if the stored checksum is the folded pseudo-header sum, else ``COMPLETE``.

    Args:
        data: Where the packet is; nothing is read outside ``data[l3:end]``.
        l3: Offset of the IPv4 or IPv6 header. A fragment is never unfinished: its checksum spans other packets.
        end: Where the packet's bytes end.
    """
    if l3 < end and load8(data, l3) >> 4 == 4:
        return _state4(data, l3, end)
    return _state6(data, l3, end)


@kernel
def _state4(data: Array, l3: int, end: int) -> int:
    if not ipv4.valid(data, l3, end) or ipv4.is_fragment(data, l3):
        return COMPLETE
    l4 = l3 + ipv4.header_length(data, l3)
    return _compare(data, l4, l3 + ipv4.total_length(data, l3), ipv4.protocol(data, l3), sum16(data, l3 + 12, 8, 0))


@kernel
def _state6(data: Array, l3: int, end: int) -> int:
    if not ipv6.valid(data, l3, end):
        return COMPLETE
    upper = ipv6.upper(data, l3, end)
    if upper < 0 or upper & 0xFF:
        return COMPLETE
    end = l3 + ipv6.HEADER + ipv6.payload_length(data, l3)
    return _compare(data, upper >> 16, end, upper >> 8 & 0xFF, sum16(data, l3 + 8, 32, 0))


@kernel
def _compare(data: Array, l4: int, end: int, protocol: int, addresses: int) -> int:
    """Compare the field of the transport header in ``data[l4:end]`` with the pseudo header's sum."""
    if protocol != _TCP and protocol != _UDP:
        return COMPLETE
    if l4 + (_TCP_HEADER if protocol == _TCP else _UDP_HEADER) > end:
        return COMPLETE
    stored = load16(data, l4 + (_TCP_CHECKSUM if protocol == _TCP else _UDP_CHECKSUM))
    return UNFINISHED if stored == fold(addresses + protocol + end - l4) else COMPLETE
