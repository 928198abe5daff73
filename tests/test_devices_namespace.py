"""Pod namespaces and rtnetlink, on the real kernel; each test makes and removes the namespaces that it uses."""

import errno
import fcntl
import os
import socket
import struct
import subprocess
import sys
from contextlib import contextmanager
from ipaddress import IPv4Address, IPv4Network, IPv6Address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.devices import namespace as ns
from dataplane.devices.netlink import (
    DUMP,
    GETLINK,
    HEADER,
    IFADDR,
    IFINFO,
    NEWADDR,
    NEWLINK,
    NEWROUTE,
    RTMSG,
    AddressEvent,
    LinkEvent,
    Monitor,
    Netlink,
    NetlinkError,
    Overrun,
    RouteEvent,
    events,
    link,
    messages,
    pack,
    unpack,
)

pytestmark = pytest.mark.netns

NAME = f"dpn{os.getpid()}"
POD = IPv4Address("10.244.1.10")
MAC = 0x0200_0AF4_010A
TUNSETIFF = 0x400454CA
TAP_WITHOUT_HEADER = 0x1002  # IFF_TAP | IFF_NO_PI


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def named() -> set[str]:
    return set(os.listdir(ns.DIRECTORY)) if ns.DIRECTORY.is_dir() else set()


@contextmanager
def opened(name_or_path: str):
    handle = ns.open_namespace(name_or_path)
    try:
        yield handle
    finally:
        ns.remove_namespace(handle)


@contextmanager
def tap(handle: ns.NamespaceHandle, name: str = "eth0"):
    def attach() -> int:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", name.encode(), TAP_WITHOUT_HEADER))
        return descriptor

    descriptor = ns.in_namespace(handle, attach)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def place(handle: ns.NamespaceHandle, *, addresses=(POD,), mtu=1450) -> int:
    return ns.place(handle, "eth0", mac=MAC, addresses=addresses, mtu=mtu)


def test_a_missing_name_is_created_and_removed_again():
    with opened(NAME) as handle:
        assert handle.created
        assert ip("netns", "exec", NAME, "cat", "/proc/sys/net/ipv4/ip_forward")
    assert NAME not in named()


def test_an_existing_name_is_used_and_left_alone():
    ip("netns", "add", NAME)
    try:
        with opened(NAME) as handle:
            assert not handle.created
        assert NAME in named()
    finally:
        ip("netns", "delete", NAME)


def test_a_missing_path_is_created_and_removed_again(tmp_path):
    path = tmp_path / "pod"
    with opened(str(path)) as handle:
        assert handle.created
        assert handle.cookie != ns.current_cookie()
        assert path.exists()
    assert not path.exists()


def test_a_path_that_exists_is_used_and_left_alone():
    with opened("/proc/self/ns/net") as handle:
        assert not handle.created
        assert handle.cookie == ns.current_cookie()


@pytest.mark.parametrize(
    ("path", "number", "words"),
    [
        ("/run/no-such-folder/pod", errno.ENOENT, "create: No such file"),
        ("/proc/self/ns/mnt", errno.EINVAL, "not a network namespace"),
        ("/etc/hostname", errno.ENOTTY, "not a namespace"),
    ],
)
def test_what_is_no_network_namespace_is_refused(path, number, words):
    with pytest.raises(ns.NamespaceError, match=words) as caught:
        ns.open_namespace(path)
    assert (caught.value.namespace, caught.value.errno) == (path, number)


def test_a_plain_file_in_the_way_of_a_name_is_refused_and_kept():
    ns.DIRECTORY.mkdir(exist_ok=True)
    file = ns.DIRECTORY / NAME
    file.touch()
    try:
        with pytest.raises(ns.NamespaceError, match="not a namespace"):
            ns.open_namespace(NAME)
        assert file.exists()
    finally:
        file.unlink()


def test_a_lack_of_permission_names_the_capabilities():
    error = ns.NamespaceError("web-0", "create", errno.EPERM)
    assert error.capability == "CAP_SYS_ADMIN and CAP_NET_ADMIN"
    assert "needs CAP_SYS_ADMIN and CAP_NET_ADMIN" in str(error)


def test_an_unprivileged_process_is_told_what_it_lacks():
    program = (
        "import ctypes, os\n"
        "from dataplane.devices.namespace import *\n"
        "os.setuid(65534)\n"
        "try: open_namespace('/proc/self/ns/net')\n"
        "except NamespaceError as error: print(error.capability)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "CAP_SYS_ADMIN and CAP_NET_ADMIN\n"


def test_a_removed_namespace_can_still_be_entered_through_its_handle():
    with opened(NAME) as handle:
        assert ns.delete_namespace(handle.path)
        assert ns.in_namespace(handle, ns.current_cookie) == handle.cookie
        assert not ns.delete_namespace(handle.path)


def test_the_namespace_after_a_removed_one_has_another_cookie():
    with opened(NAME) as handle:
        first = handle.cookie
    with opened(NAME) as handle:
        assert handle.cookie != first


def test_only_the_short_lived_thread_enters_the_namespace():
    before = ns.current_cookie()
    with opened(NAME) as handle:
        assert ns.in_namespace(handle, ns.current_cookie) == handle.cookie != before
        assert ns.current_cookie() == before


def test_an_exception_inside_reaches_the_caller():
    with opened(NAME) as handle, pytest.raises(ZeroDivisionError):
        ns.in_namespace(handle, lambda: 1 // 0)


def test_a_placed_pod_has_calicos_address_routes_mac_and_mtu():
    with opened(NAME) as handle, tap(handle):
        index = place(handle)
        with ns.in_namespace(handle, Netlink) as netlink:
            found = netlink.link(index)
        assert (found.name, found.mac, found.mtu, found.up) == ("eth0", MAC, 1450, True)
        assert ip_interface("10.244.1.10/32") in found.addresses
        routes = ip("-n", NAME, "route").split("\n")
        assert [line.strip() for line in routes if line] == [
            "default via 169.254.1.1 dev eth0",
            "169.254.1.1 dev eth0 scope link",
        ]
        assert "LOOPBACK,UP" in ip("-n", NAME, "link", "show", "lo")


def test_a_placed_pod_does_not_negotiate_ipv6():
    with opened(NAME) as handle, tap(handle):
        place(handle)
        values = ip(
            "netns",
            "exec",
            NAME,
            "sh",
            "-c",
            "cd /proc/sys/net/ipv6/conf/eth0 && cat accept_ra accept_dad dad_transmits",
        )
        assert values.split() == ["0", "0", "0"]


def test_an_ipv6_address_is_usable_at_once():
    with opened(NAME) as handle, tap(handle):
        place(handle, addresses=[POD, IPv6Address("fd00:10:244:1::a")])
        shown = ip("-n", NAME, "-6", "address", "show", "dev", "eth0", "scope", "global")
        assert "fd00:10:244:1::a/128" in shown
        assert "tentative" not in shown


def test_an_interface_that_exists_already_is_reported_with_its_namespace():
    with opened(NAME) as handle:
        ns.require_free(handle, "eth0")
        with tap(handle), pytest.raises(ns.NamespaceError, match="eth0 already exists") as caught:
            ns.require_free(handle, "eth0")
        assert caught.value.namespace == f"/run/netns/{NAME}"


def test_placing_what_is_not_there_names_the_interface():
    with opened(NAME) as handle, pytest.raises(ns.NamespaceError, match="eth0: find link eth0: No such device"):
        place(handle)


def test_a_refused_setting_carries_the_kernels_words():
    with opened(NAME) as handle, tap(handle), pytest.raises(ns.NamespaceError, match="mtu greater than device maximum"):
        place(handle, mtu=70000)


def test_a_known_namespace_is_opened_and_never_made():
    with opened(NAME) as handle:
        again = ns.known_namespace(NAME, handle.cookie)
        assert (again.cookie, again.created) == (handle.cookie, False)
        ns.remove_namespace(again)
        assert NAME in named()
        with pytest.raises(ns.NamespaceError, match="another namespace by now"):
            ns.known_namespace(NAME, handle.cookie + 1)
    with pytest.raises(ns.NamespaceError) as caught:
        ns.known_namespace(NAME)
    assert caught.value.errno == errno.ENOENT
    assert NAME not in named()


def test_an_interface_is_looked_at_with_its_addresses_and_routes():
    with opened(NAME) as handle:
        assert ns.look(handle, "eth0") is None
        with tap(handle):
            place(handle)
            found = ns.look(handle, "eth0")
    assert found is not None
    assert (found.link.mac, found.link.mtu, found.link.up) == (MAC, 1450, True)
    assert ip_interface(f"{POD}/32") in found.link.addresses
    default = IPv4Network("0.0.0.0/0")
    assert {route for route in found.routes if route[0].version == 4} == {
        (IPv4Network("169.254.1.1/32"), None),
        (default, ns.GATEWAY),
    }


def test_closing_the_tap_removes_the_interface_and_unplace_is_idempotent():
    with opened(NAME) as handle:
        with tap(handle):
            place(handle)
            assert ns.unplace(handle, "eth0")
            assert not ns.unplace(handle, "eth0")
        with tap(handle):
            place(handle)
        assert not ns.unplace(handle, "eth0")
        assert ip("-n", NAME, "route") == ""


def test_no_descriptor_or_thread_is_left_over():
    with opened(NAME) as handle, tap(handle):
        place(handle)
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    with opened(NAME) as handle, tap(handle):
        place(handle)
    assert (len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))) == before


def test_a_link_is_found_by_name_and_by_index():
    loopback = link("lo")
    assert loopback == link(loopback.index)
    assert loopback.index == ns.LOOPBACK
    with pytest.raises(NetlinkError, match="find link nowhere0") as caught:
        link("nowhere0")
    assert caught.value.errno == errno.ENODEV


def test_links_are_listed_with_their_addresses():
    with opened(NAME) as handle, tap(handle):
        place(handle)
        with ns.in_namespace(handle, Netlink) as netlink:
            found = {each.name: each for each in netlink.links()}
    assert set(found) == {"lo", "eth0"}
    assert ip_interface("127.0.0.1/8") in found["lo"].addresses


def test_a_monitor_hears_of_links_addresses_and_routes():
    with opened(NAME) as handle:
        monitor = ns.in_namespace(handle, Monitor)
        try:
            assert monitor.read() == []
            with tap(handle):
                index = place(handle)
            heard = [event for _ in range(200) for event in monitor.read()]
        finally:
            monitor.close()
    links = [event for event in heard if isinstance(event, LinkEvent) and event.link.name == "eth0"]
    assert [event.gone for event in links][-1] is True
    assert any(event.link.up and event.link.mtu == 1450 and event.link.mac == MAC for event in links)
    assert AddressEvent(index, ip_interface("10.244.1.10/32"), gone=False) in heard
    assert RouteEvent(IPv4Network("0.0.0.0/0"), IPv4Address("169.254.1.1"), index, 254, gone=False) in heard


def test_a_monitor_that_is_too_slow_says_so():
    with opened(NAME) as handle:
        monitor = ns.in_namespace(handle, Monitor)
        try:
            with socket.socket(fileno=os.dup(monitor.fileno())) as same:
                same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            for _ in range(10):
                with tap(handle):
                    place(handle)
            heard = [event for _ in range(1000) for event in monitor.read()]
        finally:
            monitor.close()
    assert Overrun() in heard


@given(st.dictionaries(st.integers(0, 0x3FFF), st.binary(max_size=40)))
def test_attributes_survive_the_round_trip(attributes):
    assert unpack(b"".join(pack(kind, value) for kind, value in attributes.items())) == attributes


@given(st.binary(max_size=200))
def test_any_bytes_are_parsed_without_an_error(data):
    unpack(data)
    list(messages(data))


ATTRIBUTES = st.builds(pack, st.integers(0, 16), st.binary(min_size=4, max_size=4) | st.binary(max_size=20))


@given(st.sampled_from([NEWLINK, NEWADDR, NEWROUTE]), st.binary(max_size=20), st.lists(ATTRIBUTES, max_size=8))
def test_any_message_of_a_known_kind_is_parsed_without_an_error(kind, head, attributes):
    fixed = {NEWLINK: IFINFO.size, NEWADDR: IFADDR.size, NEWROUTE: RTMSG.size}[kind]
    body = bytes([socket.AF_INET]) + head.ljust(fixed - 1, b"\x21")[: fixed - 1] + b"".join(attributes)
    events(HEADER.pack(HEADER.size + len(body), kind, 0, 0, 0) + body)


def test_a_truncated_message_ends_the_datagram():
    with Netlink() as netlink:
        bodies = netlink.request("list links", GETLINK, DUMP, IFINFO.pack(0, 0, 0, 0, 0))
    whole = HEADER.pack(HEADER.size + len(bodies[0]), NEWLINK, 0, 0, 0) + bodies[0]
    assert len(events(whole)) == 1
    assert events(whole[:-1]) == []
