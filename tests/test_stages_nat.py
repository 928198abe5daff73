"""nat: packets in and packets out, beside scapy; rewriting back; checksums left to devices; ICMP errors."""

from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt
from scapy.layers.l2 import Ether
from scapy.layers.vxlan import VXLAN
from scapy.packet import Raw

from dataplane import batch as b
from dataplane.devices.memory import Vnet
from dataplane.tables.flow import ORIGINAL, REPLY
from dataplane.verdict import Verdict
from tests.frames import recomputed
from tests.strategies import naive_checksum, naive_sum, pseudo_bytes
from tests.translation import Side, Translator, Way, frame_of, ip, packet, record_sides, sides, way

TRANSLATOR = Translator()  # the arena is 40 MB: one is enough


@pytest.fixture
def translator():
    TRANSLATOR.rows = 0
    return TRANSLATOR


# Each flow is two lines: what a packet of each direction comes in as, and what it leaves as.
TRANSLATIONS = """
# protocol direction src                   dst                   -> src                   dst
# masquerade
  udp      out       10.244.1.10:4000      198.51.100.7:53       -> 192.0.2.11:32768      198.51.100.7:53
  udp      back      198.51.100.7:53       192.0.2.11:32768      -> 198.51.100.7:53       10.244.1.10:4000
  tcp      out       10.244.1.10:4000      198.51.100.7:80       -> 192.0.2.11:4000       198.51.100.7:80
  tcp      back      198.51.100.7:80       192.0.2.11:4000       -> 198.51.100.7:80       10.244.1.10:4000
  icmp     out       10.244.1.10:7         198.51.100.7          -> 192.0.2.11:40000      198.51.100.7
  icmp     back      198.51.100.7          192.0.2.11:40000      -> 198.51.100.7          10.244.1.10:7
  icmp     out       10.244.1.10:7         198.51.100.7          -> 192.0.2.11:7          198.51.100.7
  icmp     back      198.51.100.7          192.0.2.11:7          -> 198.51.100.7          10.244.1.10:7
  other    out       10.244.1.10           198.51.100.7          -> 192.0.2.11            198.51.100.7
  other    back      198.51.100.7          192.0.2.11            -> 198.51.100.7          10.244.1.10
# a service
  udp      out       10.244.1.10:4000      10.96.0.10:53         -> 10.244.1.10:4000      10.244.2.10:5353
  udp      back      10.244.2.10:5353      10.244.1.10:4000      -> 10.96.0.10:53         10.244.1.10:4000
  tcp      out       10.244.1.10:4000      10.96.0.1:443         -> 10.244.1.10:4000      10.244.2.10:6443
  tcp      back      10.244.2.10:6443      10.244.1.10:4000      -> 10.96.0.1:443         10.244.1.10:4000
# both: a node port, and a pod that reaches itself
  tcp      out       198.51.100.7:4000     192.0.2.11:30053      -> 192.0.2.11:61000      10.244.1.10:53
  tcp      back      10.244.1.10:53        192.0.2.11:61000      -> 192.0.2.11:30053      198.51.100.7:4000
  udp      out       10.244.1.10:4000      10.96.0.10:53         -> 192.0.2.11:4000       10.244.1.10:53
  udp      back      10.244.1.10:53        192.0.2.11:4000       -> 10.96.0.10:53         10.244.1.10:4000
# IPv6
  udp      out       [fd00::10]:4000       [2001:db8::7]:53      -> [2001:db8::11]:1025   [2001:db8::7]:53
  udp      back      [2001:db8::7]:53      [2001:db8::11]:1025   -> [2001:db8::7]:53      [fd00::10]:4000
  tcp      out       [fd00::10]:4000       [fd00:96::1]:443      -> [fd00::10]:4000       [fd00:2::10]:6443
  tcp      back      [fd00:2::10]:6443     [fd00::10]:4000       -> [fd00:96::1]:443      [fd00::10]:4000
  icmp6    out       [fd00::10]:7          [2001:db8::7]         -> [2001:db8::11]:9      [2001:db8::7]
  icmp6    back      [2001:db8::7]         [2001:db8::11]:9      -> [2001:db8::7]         [fd00::10]:7
  other    out       [fd00::10]            [2001:db8::7]         -> [2001:db8::11]        [2001:db8::7]
  other    back      [2001:db8::7]         [2001:db8::11]        -> [2001:db8::7]         [fd00::10]
"""


def flows_of(table):
    """Both ways in, and for each direction what it leaves as, of each pair of lines."""
    lines = [line.split() for line in table.splitlines() if line.strip() and not line.startswith("#")]
    return [
        pytest.param(
            (way(out[0], *out[2:4]), way(back[0], *back[2:4])),
            (tuple(out[5:]), tuple(back[5:])),
            id=f"{out[0]} {out[2]} to {out[3]} from {out[5]}",
        )
        for out, back in zip(lines[::2], lines[1::2], strict=True)
    ]


@pytest.mark.parametrize(("ways", "expected"), flows_of(TRANSLATIONS))
def test_both_directions_leave_as_the_other_ones_tuple_inverted(translator, ways, expected):
    row = translator.flow(*ways)
    for direction in (ORIGINAL, REPLY):
        frame = bytes(frame_of(packet(ways[direction], reply=direction == REPLY)))
        outcome = translator.one(frame, 2 * row + direction)
        assert outcome.verdict == Verdict.ACCEPT
        assert sides(outcome.frame) == expected[direction]
        assert outcome.frame == recomputed(outcome.frame)
        assert len(outcome.frame) == len(frame)


@pytest.mark.parametrize(("ways", "expected"), flows_of(TRANSLATIONS))
def test_the_record_says_what_the_frame_says(translator, ways, expected):
    row = translator.flow(*ways)
    for direction in (ORIGINAL, REPLY):
        outcome = translator.one(frame_of(packet(ways[direction], reply=direction == REPLY)), 2 * row + direction)
        assert record_sides(outcome.record) == record_sides(translator.parsed(outcome.frame))


SNAT = way("udp", "10.244.1.10:4000", "198.51.100.7:53"), way("udp", "198.51.100.7:53", "192.0.2.11:32768")
DNAT = way("udp", "10.244.1.10:4000", "10.96.0.10:53"), way("udp", "10.244.2.10:5353", "10.244.1.10:4000")
BOTH = way("udp", "198.51.100.7:4000", "192.0.2.11:30053"), way("udp", "10.244.1.10:53", "192.0.2.11:61000")


# --- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verdict", [Verdict.DROP, Verdict.QUEUE, Verdict.STOLEN])
def test_packets_with_another_verdict_are_untouched(translator, verdict):
    row = translator.flow(*SNAT)
    frame = bytes(frame_of(packet(SNAT[0])))
    outcome = translator.one(frame, 2 * row, verdict=verdict)
    assert (outcome.frame, outcome.record["sport"]) == (frame, 4000)


def test_packets_of_no_flow_are_untouched(translator):
    translator.flow(*SNAT)
    frame = bytes(frame_of(packet(SNAT[0])))
    assert translator.one(frame, -1).frame == frame


def test_packets_of_a_flow_that_is_not_translated_are_untouched(translator):
    row = translator.flow(SNAT[0], SNAT[0].inverse)
    frame = bytes(frame_of(packet(SNAT[0])))
    frame = frame[:40] + b"\x12\x34" + frame[42:]  # not even a checksum
    assert translator.one(frame, 2 * row).frame == frame


def test_a_burst_holds_packets_of_many_flows(translator):
    flows = [translator.flow(*ways) for ways in (SNAT, DNAT, BOTH)]
    frames = [bytes(frame_of(packet(ways[0]))) for ways in (SNAT, DNAT, BOTH)]
    alone = [translator.one(frame, 2 * row).frame for frame, row in zip(frames, flows, strict=True)]
    together = translator.run(frames * 3, [2 * row for row in flows] * 3)
    assert [outcome.frame for outcome in together] == alone * 3


# --- complete checksums ----------------------------------------------------------------------------------------------

ADDRESSES = {
    4: st.tuples(*[st.integers(0, 255)] * 4).map(lambda octets: ".".join(map(str, octets))),
    6: st.tuples(*[st.integers(1, 0xFFFF)] * 8).map(lambda words: ":".join(f"{word:x}" for word in words)),
}


@st.composite
def translations(draw):
    """The two ways of a flow, both ends of which may be translated."""
    family = draw(st.sampled_from([4, 6]))
    protocol = draw(st.sampled_from([6, 17, 1 if family == 4 else 58, 253]))
    client, service, backend, mask = (draw(ADDRESSES[family]) for _ in range(4))
    ports = [draw(st.integers(0, 0xFFFF)) if protocol != 253 else 0 for _ in range(4)]
    if protocol in (1, 58):
        ports[1] = ports[2] = 0
    original = Way(protocol, Side(client, ports[0]), Side(service, ports[1]))
    return original, Way(protocol, Side(backend, ports[2]), Side(mask, ports[3]))


payloads = st.binary(max_size=64)


@given(ways=translations(), payload=payloads, reply=st.booleans())
@settings(max_examples=150)
def test_every_checksum_equals_one_computed_anew(ways, payload, reply):
    translator = TRANSLATOR
    translator.rows = 0
    row = translator.flow(*ways)
    frame = bytes(frame_of(packet(ways[reply], payload, reply)))
    outcome = translator.one(frame, 2 * row + reply)
    assert outcome.frame == recomputed(outcome.frame)
    assert sides(outcome.frame) == sides(bytes(frame_of(packet(ways[1 - reply].inverse, payload, reply))))


@given(ways=translations(), payload=payloads, zero=st.booleans())
@settings(max_examples=150)
def test_what_is_translated_back_is_what_it_was(ways, payload, zero):
    translator = TRANSLATOR
    translator.rows = 0
    there = translator.flow(*ways)
    back = translator.flow(ways[REPLY].inverse, ways[ORIGINAL].inverse)
    original = packet(ways[ORIGINAL], payload)
    if zero and UDP in original and IP in original:
        original[UDP].chksum = 0
    frame = bytes(frame_of(original))
    assert translator.one(translator.one(frame, 2 * there).frame, 2 * back).frame == frame


def test_udp_without_a_checksum_stays_without(translator):
    row = translator.flow(*SNAT)
    bare = packet(SNAT[0])
    bare[UDP].chksum = 0
    outcome = translator.one(frame_of(bare), 2 * row)
    assert Ether(outcome.frame)[UDP].chksum == 0
    assert outcome.frame == recomputed(outcome.frame)


def payload_for_checksum_zero(of):
    """A payload with which a datagram's checksum is computed as 0."""
    probe = bytes(packet(of, bytes(2)))[20:]
    pseudo = bytes(packet(of))[12:20] + bytes([0, 17, 0, len(probe)])
    return naive_checksum(pseudo + probe[:6] + bytes(2) + probe[8:]).to_bytes(2, "big")


def test_a_udp_checksum_of_zero_is_sent_as_ones(translator):
    row = translator.flow(*SNAT)
    frame = frame_of(packet(SNAT[0], payload_for_checksum_zero(SNAT[1].inverse)))
    outcome = translator.one(frame, 2 * row)
    assert Ether(outcome.frame)[UDP].chksum == 0xFFFF
    assert outcome.frame == recomputed(outcome.frame)


def test_ones_for_a_udp_checksum_are_a_zero_that_is_updated(translator):
    row = translator.flow(*SNAT)
    frame = frame_of(packet(SNAT[0], payload_for_checksum_zero(SNAT[0])))
    assert Ether(bytes(frame))[UDP].chksum == 0xFFFF
    outcome = translator.one(frame, 2 * row)
    assert outcome.frame == recomputed(outcome.frame)


def test_an_echo_reply_that_is_all_zeros_has_ones_for_a_checksum(translator):
    ways = way("icmp", "10.244.1.10:0", "198.51.100.7"), way("icmp", "198.51.100.7", "192.0.2.11:9")
    row = translator.flow(*ways)
    reply = packet(ways[REPLY], b"", reply=True)
    reply[ICMP].seq = 0
    outcome = translator.one(frame_of(reply), 2 * row + REPLY)
    assert outcome.frame[34:] == bytes([0, 0, 0xFF, 0xFF, 0, 0, 0, 0])


@pytest.mark.parametrize("protocol", [6, 17, 1])
def test_a_wrong_checksum_stays_wrong(translator, protocol):
    """RFC 1624 carries the error along: corruption is not laundered."""
    original = Way(protocol, Side("10.244.1.10", 4000), Side("198.51.100.7", 0 if protocol == 1 else 80))
    row = translator.flow(original, Way(protocol, original.dst, Side("192.0.2.11", 4001)))
    sound = bytes(frame_of(packet(original)))
    damaged = sound[:-1] + bytes([sound[-1] ^ 1])
    outcome, expected = (translator.one(frame, 2 * row).frame for frame in (damaged, sound))
    assert outcome == expected[:-1] + bytes([expected[-1] ^ 1])
    assert outcome != recomputed(outcome)


def test_options_and_extension_headers_are_stepped_over(translator):
    row = translator.flow(*SNAT)
    optioned = packet(SNAT[0], options=[IPOption_NOP()] * 4)
    outcome = translator.one(frame_of(optioned), 2 * row)
    assert sides(outcome.frame) == sides(bytes(frame_of(packet(SNAT[1].inverse))))
    assert outcome.frame == recomputed(outcome.frame)
    ways = way("udp", "[fd00::10]:4000", "[2001:db8::7]:53"), way("udp", "[2001:db8::7]:53", "[2001:db8::11]:9")
    row = translator.flow(*ways)
    extended = IPv6(src="fd00::10", dst="2001:db8::7") / IPv6ExtHdrDestOpt() / packet(ways[0]).payload
    outcome = translator.one(frame_of(extended), 2 * row)
    assert Ether(outcome.frame)[UDP].sport == 9
    assert outcome.frame == recomputed(outcome.frame)


def test_a_torn_transport_header_is_not_written_behind_its_end(translator):
    row = translator.flow(*SNAT)
    torn = bytes(frame_of(ip(17, "10.244.1.10", "198.51.100.7") / Raw(b"1234567")))
    outcome = translator.one(torn, 2 * row)
    assert Ether(outcome.frame)[IP].src == "192.0.2.11"
    assert outcome.frame[34:] == torn[34:]


# --- checksums that are left to the device (P3) ----------------------------------------------------------------------


def unfinished(frame, at=34, offset=6):
    """The frame with the pseudo header's sum where its checksum goes."""
    network = Ether(frame).payload
    protocol = network.proto if IP in network else network.nh
    pseudo = pseudo_bytes(int(ip_address(network.src)), int(ip_address(network.dst)), protocol, len(frame) - at)
    return frame[: at + offset] + naive_sum(pseudo).to_bytes(2, "big") + frame[at + offset + 2 :]


def finished(frame, vnet):
    """What a device makes of the frame."""
    at = vnet.csum_start + vnet.csum_offset
    value = naive_checksum(frame[vnet.csum_start :])
    value = 0xFFFF if value == 0 and vnet.csum_offset == 6 else value
    return frame[:at] + value.to_bytes(2, "big") + frame[at + 2 :]


@given(ways=translations().filter(lambda ways: ways[0].protocol in (6, 17)), payload=payloads, reply=st.booleans())
@settings(max_examples=100)
def test_a_device_finishes_the_checksum_of_a_translated_packet(ways, payload, reply):
    translator = TRANSLATOR
    translator.rows = 0
    row = translator.flow(*ways)
    at, offset = 34 if ways[0].family == 4 else 54, 16 if ways[0].protocol == 6 else 6
    vnet = Vnet(b.NEEDS_CSUM, csum_start=at, csum_offset=offset)
    frame = unfinished(bytes(frame_of(packet(ways[reply], payload))), at, offset)
    outcome = translator.one(frame, 2 * row + reply, vnet)
    assert outcome.record["vnet_flags"] == b.NEEDS_CSUM
    assert finished(outcome.frame, vnet) == recomputed(outcome.frame)


def test_the_unfinished_checksum_of_a_packet_inside_leaves_the_outer_one_complete(translator):
    """A tunnel in the pod: its outer checksum is made for what the device will have written (LCO)."""
    original = way("udp", "10.244.1.10:4000", "198.51.100.7:4789")
    row = translator.flow(original, way("udp", "198.51.100.7:4789", "192.0.2.11:61000"))
    inner = bytes(Ether() / IP(src="203.0.113.1", dst="203.0.113.2") / TCP() / Raw(b"inside"))
    outer = bytes(frame_of(packet(original, bytes(VXLAN(vni=7)) + inner)))
    at = len(outer) - len(inner) + 34
    vnet = Vnet(b.NEEDS_CSUM, csum_start=at, csum_offset=16)
    left = outer[: -len(inner)] + unfinished(inner, offset=16)
    assert finished(left, vnet) == outer
    outcome = translator.one(left, 2 * row, vnet)
    assert outcome.frame[at:] == left[at:]
    whole = finished(outcome.frame, vnet)
    assert sides(whole) == ("192.0.2.11:61000", "198.51.100.7:4789")
    assert whole == recomputed(whole)


@pytest.mark.parametrize(
    ("protocol", "family", "gso"),
    [
        (6, 4, b.GSO_TCPV4),
        (6, 4, b.GSO_TCPV4 | b.GSO_ECN),
        (6, 6, b.GSO_TCPV6),
        (17, 4, b.GSO_UDP_L4),
        (17, 6, b.GSO_UDP_L4),
    ],
)
def test_a_super_frame_is_translated_whole(translator, protocol, family, gso):
    """The device sums up each segment's own ports, payload and length: the addresses are all that it takes as given."""
    client, server, mask = (
        ("10.244.1.10", "198.51.100.7", "192.0.2.11") if family == 4 else ("fd00::1", "fd01::2", "fd02::3")
    )
    original = Way(protocol, Side(client, 4000), Side(server, 80))
    row = translator.flow(original, Way(protocol, original.dst, Side(mask, 61000)))
    at, offset = 34 if family == 4 else 54, 16 if protocol == 6 else 6
    frame = unfinished(bytes(frame_of(packet(original, bytes(range(250)) * 80))), at, offset)
    outcome = translator.one(frame, 2 * row, Vnet(b.NEEDS_CSUM, gso, at + 20, 1400, at, offset))
    assert (outcome.record["gso_type"], outcome.record["gso_size"]) == (gso, 1400)
    assert outcome.frame == unfinished(outcome.frame, at, offset)
    assert sides(outcome.frame) == (str(Side(mask, 61000)), str(Side(server, 80)))
    assert outcome.frame[at + 4 : at + offset] == frame[at + 4 : at + offset]
    assert outcome.frame[at + offset + 2 :] == frame[at + offset + 2 :]
