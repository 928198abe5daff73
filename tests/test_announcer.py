"""announcer: what is said to the LAN, and when."""

from dataclasses import replace
from ipaddress import IPv4Address

from scapy.layers.l2 import ARP, Ether

from dataplane.control.announcer import PERIOD_NS, SECOND, Announcer, gratuitous
from tests.announced import ADDRESS, HERE, service, state

MAC = 0x0200_C000_020B


def test_the_frames_are_gratuitous_arp_by_scapys_reading():
    for operation, frame in zip((1, 2), gratuitous(MAC, ADDRESS), strict=True):
        parsed = Ether(frame)
        assert (parsed.dst, parsed.src, len(frame)) == ("ff:ff:ff:ff:ff:ff", "02:00:c0:00:02:0b", 42)
        arp = parsed[ARP]
        assert (arp.op, arp.hwtype, arp.ptype, arp.hwlen, arp.plen) == (operation, 1, 0x0800, 6, 4)
        assert (arp.psrc, arp.pdst, arp.hwsrc, arp.hwdst) == ("192.0.2.200", "192.0.2.200", parsed.src, parsed.dst)


MINE = service(HERE)
OWNING, LOSING = state(MINE, peers=()), state(MINE)


def times(announcer: Announcer, first: list[bytes], start: int, until: int) -> list[float]:
    """Let time run from one due moment to the next; return when a pair was sent, in seconds."""
    found = [0.0] * (len(first) // 2)
    while announcer.next_at is not None and announcer.next_at <= until:
        now = announcer.next_at
        frames = announcer.tick(now)
        assert [Ether(frame)[ARP].op for frame in frames] == [1, 2] * (len(frames) // 2)
        found += [round((now - start) / SECOND, 3)] * (len(frames) // 2)
    return found


def test_a_new_owner_speaks_at_once_then_every_1100_ms_for_5_s_then_once_a_minute():
    announcer, start = Announcer(MAC), 77 * SECOND
    first = announcer.update(OWNING, start)
    assert announcer.owned == {ADDRESS}
    found = times(announcer, first, start, start + 200 * SECOND)
    assert found == [0.0, 1.1, 2.2, 3.3, 4.4, 64.4, 124.4, 184.4]
    assert announcer.sent == 2 * len(found)


def test_nothing_is_sent_before_it_is_due():
    announcer = Announcer(MAC)
    announcer.update(OWNING, 0)
    assert announcer.next_at is not None
    assert announcer.tick(announcer.next_at - 1) == []


def test_who_loses_an_address_is_silent_and_speaks_anew_when_it_comes_back():
    announcer = Announcer(MAC)
    assert len(announcer.update(OWNING, 0)) == 2
    assert announcer.update(LOSING, SECOND) == []
    assert (announcer.owned, announcer.next_at) == (frozenset(), None)
    assert announcer.tick(PERIOD_NS) == []
    first = announcer.update(OWNING, 2 * PERIOD_NS)
    assert times(announcer, first, 2 * PERIOD_NS, 2 * PERIOD_NS + 6 * SECOND) == [0.0, 1.1, 2.2, 3.3, 4.4]


def test_an_address_that_stays_is_not_announced_anew_by_a_change_of_others():
    announcer = Announcer(MAC)
    announcer.update(OWNING, 0)
    second = replace(service(HERE, ip=IPv4Address("192.0.2.201")), name="other")
    frames = announcer.update(replace(OWNING, services=(MINE, second)), SECOND)
    assert {Ether(frame)[ARP].psrc for frame in frames} == {"192.0.2.201"}
    assert announcer.next_at == 1_100_000_000


def test_a_late_tick_sends_one_pair_and_goes_on():
    announcer = Announcer(MAC)
    announcer.update(OWNING, 0)
    assert len(announcer.tick(3 * SECOND)) == 2
    assert announcer.next_at == 3 * SECOND + 1_100_000_000
    assert len(announcer.tick(30 * SECOND)) == 2
    assert announcer.next_at == 30 * SECOND + PERIOD_NS


def test_a_slightly_late_tick_does_not_shift_those_after_it():
    announcer = Announcer(MAC)
    announcer.update(OWNING, 0)
    announcer.tick(1_100_000_000 + 20_000_000)
    assert announcer.next_at == 2_200_000_000


def test_another_mac_is_told_to_everybody_at_once():
    announcer = Announcer(MAC)
    announcer.update(OWNING, 0)
    announcer.mac = MAC + 1
    frames = announcer.repeat(20 * SECOND)
    assert {Ether(frame).src for frame in frames} == {"02:00:c0:00:02:0c"}
    assert times(announcer, frames, 20 * SECOND, 26 * SECOND) == [0.0, 1.1, 2.2, 3.3, 4.4]


def test_what_may_have_moved_is_not_announced_and_the_nodes_own_address_is():
    is_owner = [False]
    announcer = Announcer(MAC, lambda now: is_owner[0])
    assert OWNING.uplink is not None
    own = replace(OWNING, uplink=replace(OWNING.uplink, shared=False))
    own_address = {str(address) for address in OWNING.node.addresses}
    assert {Ether(frame)[ARP].psrc for frame in announcer.update(own, 0)} == own_address
    is_owner[0] = True
    assert {Ether(frame)[ARP].psrc for frame in announcer.repeat(SECOND)} == own_address | {str(ADDRESS)}
