"""Pod namespaces: open or create one, enter it for a moment, and set up the interface that was opened in it.

A network namespace is a property of a thread; a thread that ends right after enters it (`in_namespace`). A TAP
belongs to the namespace in which /dev/net/tun was opened, and a netlink socket to the one in which it was made; both
work from everywhere afterwards. So a pod's TAP is opened inside the pod's namespace, under its final name: nothing is
moved or renamed, and a node that dies half way leaves no stray interface in the host's namespace.

    namespace = open_namespace("web-0")
    require_free(namespace, "eth0")
    tap = in_namespace(namespace, lambda: Tap("eth0"))
    place(namespace, "eth0", mac=..., addresses=[...], mtu=1450)

A name stands for /run/netns/NAME, made as ip-netns(8) makes it: an empty file with the namespace mounted on it.
The three steps take 4 ms per pod, half of it the kernel making the namespace.
"""

import ctypes
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, ip_interface
from pathlib import Path
from threading import Thread
from typing import TypeVar

from dataplane.devices.netlink import Address, Link, Netlink, NetlinkError, Network

DIRECTORY = Path("/run/netns")
GATEWAY = IPv4Address("169.254.1.1")  # the address that no machine has: every pod's next hop, answered by proxy ARP
EVERYWHERE = IPv4Network("0.0.0.0/0")
LOOPBACK = 1  # the index of lo in every namespace

CLONE_NEWNET = 0x40000000
MS_BIND, MS_REC, MS_SHARED = 4096, 16384, 1 << 20
MNT_DETACH = 2
NS_GET_NSTYPE = 0xB703  # ioctl: the CLONE_NEW* of a namespace's file (ioctl_ns(2))
SO_NETNS_COOKIE = 71

log = logging.getLogger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)
Result = TypeVar("Result")


class NamespaceError(Exception):
    """A pod's namespace could not be had, entered or set up.

    Attributes:
        namespace: Its name or path.
        operation: What was attempted.
        errno: The system's error number.
        capability: What the process would need, when it lacks permission; otherwise empty.
    """

    def __init__(self, namespace: str, operation: str, number: int, text: str = "") -> None:
        self.namespace, self.operation, self.errno = namespace, operation, number
        self.capability = "CAP_SYS_ADMIN and CAP_NET_ADMIN" if number in (errno.EPERM, errno.EACCES) else ""
        reason = f"needs {self.capability}" if self.capability else text or os.strerror(number)
        super().__init__(f"namespace {namespace}: {operation}: {reason}")


@dataclass(frozen=True, slots=True)
class NamespaceHandle:
    """An open network namespace.

    Attributes:
        fd: Keeps the namespace alive until it is closed, even when its name is deleted.
        path: The file that names it.
        created: Whether `open_namespace` made it, so that `remove_namespace` may remove it.
        cookie: The kernel's number for it, never used again before the next boot.
    """

    fd: int
    path: Path
    created: bool
    cookie: int


def namespace_path(name_or_path: str) -> Path:
    """Return the file that a name (``web-0``) or a path (``/proc/4711/ns/net``) stands for."""
    return Path(name_or_path) if "/" in name_or_path else DIRECTORY / name_or_path


def open_namespace(name_or_path: str) -> NamespaceHandle:
    """Open a namespace; it is created when it is missing, at a path as under a name.

    Raises:
        NamespaceError: A folder that does not exist, a file that is no network namespace, or no permission.
    """
    path = namespace_path(name_or_path)
    created = not path.exists()
    try:
        if created:
            _create(path)
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceError(str(path), "create" if created else "open", error.errno or 0) from error
    try:
        return NamespaceHandle(fd, path, created, _cookie(fd, path))
    except BaseException:
        os.close(fd)
        raise


def known_namespace(name_or_path: str, cookie: int = 0) -> NamespaceHandle:
    """Open a namespace that somebody else has made: this one and no other, unless the cookie is 0.

    Raises:
        NamespaceError: There is none, or (``ENOENT`` as well) it is another one by now: process ids are used again.
    """
    path = namespace_path(name_or_path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceError(str(path), "open", error.errno or 0) from error
    try:
        found = _cookie(fd, path)
        if cookie not in (0, found):
            raise NamespaceError(str(path), "open", errno.ENOENT, "it is another namespace by now")
    except BaseException:
        os.close(fd)
        raise
    return NamespaceHandle(fd, path, created=False, cookie=found)


def remove_namespace(handle: NamespaceHandle) -> None:
    """Close a namespace, and remove it from the system when `open_namespace` had created it."""
    os.close(handle.fd)
    if handle.created:
        delete_namespace(handle.path)


def delete_namespace(path: Path) -> bool:
    """Remove a named namespace as ``ip netns delete`` does; return whether there was one.

    Raises:
        NamespaceError: The system does not allow it.
    """
    try:
        with suppress(FileNotFoundError):
            _unmount(path)
            path.unlink()
            return True
    except OSError as error:
        raise NamespaceError(str(path), "delete", error.errno or 0) from error
    return False


def in_namespace(handle: NamespaceHandle, function: Callable[[], Result]) -> Result:
    """Return what the function returns when it runs inside the namespace, in a thread of its own.

    Raises:
        NamespaceError: The namespace cannot be entered.
    """

    def enter() -> Result:
        if _libc.setns(handle.fd, CLONE_NEWNET):
            raise NamespaceError(str(handle.path), "enter", ctypes.get_errno())
        return function()

    return _in_thread(enter)


def require_free(handle: NamespaceHandle, interface: str) -> None:
    """Check that the namespace has no such interface yet.

    Raises:
        NamespaceError: It has (``EEXIST``).
    """
    with in_namespace(handle, Netlink) as netlink:
        if netlink.exists(interface):
            raise NamespaceError(
                str(handle.path), f"add {interface}", errno.EEXIST, f"an interface {interface} already exists in it"
            )


def place(
    handle: NamespaceHandle, interface: str, *, mac: int, addresses: Sequence[Address], mtu: int,
    gateway: IPv4Address = GATEWAY,
) -> int:  # fmt: skip
    """Set up a TAP that was opened in a namespace as a pod's interface, and return its index.

    The pod gets its addresses (each a /32 or /128), the loopback interface up, and two routes: the gateway on the
    link, and everything else through the gateway. The loopback interface stays up when the pod goes.

    Raises:
        NamespaceError: The interface is not there, or something was refused.
    """
    in_namespace(handle, lambda: _quieten(interface))
    try:
        with in_namespace(handle, Netlink) as netlink:
            index = netlink.link(interface).index
            netlink.set_link(LOOPBACK, up=True)
            netlink.set_link(index, mac=mac, mtu=mtu)
            netlink.set_link(index, up=True)
            for address in addresses:
                netlink.add_address(index, ip_interface(address))
            netlink.add_route(index, IPv4Network(gateway))
            netlink.add_route(index, EVERYWHERE, gateway)
            return index
    except NetlinkError as error:
        raise NamespaceError(str(handle.path), f"{interface}: {error.operation}", error.errno, error.text) from error


@dataclass(frozen=True, slots=True)
class Found:
    """What an interface of a namespace is like; its routes are those of the main table, (destination, gateway)."""

    link: Link
    routes: frozenset[tuple[Network, Address | None]]


def look(handle: NamespaceHandle, interface: str) -> Found | None:
    """Return what an interface of a namespace is like; None when there is none.

    Raises:
        NamespaceError: The system does not say.
    """
    try:
        with in_namespace(handle, Netlink) as netlink:
            link = netlink.link(interface)
            routes = netlink.routes(link.index)
    except NetlinkError as error:
        if error.errno == errno.ENODEV:
            return None
        raise NamespaceError(str(handle.path), f"{interface}: {error.operation}", error.errno, error.text) from error
    return Found(link, frozenset((route.destination, route.gateway) for route in routes))


def unplace(handle: NamespaceHandle, interface: str) -> bool:
    """Remove a pod's interface if it still exists, and return whether it did.

    A TAP that is not persistent goes with its descriptor, and its addresses and routes with it; this is for the others.
    """
    try:
        with in_namespace(handle, Netlink) as netlink:
            netlink.delete_link(netlink.link(interface).index)
    except NetlinkError as error:
        if error.errno == errno.ENODEV:
            return False
        raise NamespaceError(str(handle.path), f"{interface}: {error.operation}", error.errno, error.text) from error
    return True


def _in_thread(function: Callable[[], Result]) -> Result:
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:  # the caller raises it again
            future.set_exception(error)

    thread = Thread(target=run, name="namespace")
    thread.start()
    thread.join()
    return future.result()


def _cookie(fd: int, path: Path) -> int:
    try:
        kind = fcntl.ioctl(fd, NS_GET_NSTYPE)
    except OSError as error:
        raise NamespaceError(str(path), "open", error.errno or 0, "it is not a namespace") from error
    if kind != CLONE_NEWNET:
        raise NamespaceError(str(path), "open", errno.EINVAL, "it is not a network namespace")
    return in_namespace(NamespaceHandle(fd, path, created=False, cookie=0), current_cookie)


def current_cookie() -> int:
    """Return the kernel's number for the namespace of the calling thread."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        return int.from_bytes(probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def _quieten(interface: str) -> None:
    """Keep the kernel of the pod from announcing itself over IPv6: its addresses are assigned, not negotiated."""
    settings = Path("/proc/sys/net/ipv6/conf") / interface
    if not settings.is_dir():
        return  # a kernel without IPv6
    for name in ("accept_ra", "accept_dad", "dad_transmits", "router_solicitations"):
        (settings / name).write_text("0")


def _create(path: Path) -> None:
    if path.parent == DIRECTORY:
        _share_directory()
        if _mounts_stay_private():
            log.warning("namespace %s is seen by this node only: start it with nsenter --net, not ip netns exec", path)
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    try:
        _in_thread(lambda: _mount_new(path))
    except BaseException:
        path.unlink()
        raise


def _share_directory() -> None:
    """Make /run/netns, and the mounts below it visible in every mount namespace, as ``ip netns add`` does."""
    DIRECTORY.mkdir(mode=0o755, parents=True, exist_ok=True)
    directory = os.fsencode(DIRECTORY)
    if _libc.mount(b"", directory, b"none", MS_SHARED | MS_REC, None):
        _check(_libc.mount(directory, directory, b"none", MS_BIND | MS_REC, None))
        _check(_libc.mount(b"", directory, b"none", MS_SHARED | MS_REC, None))


def _mount_new(path: Path) -> None:
    """Make a namespace in this thread and mount it on the file, so that it outlives the thread."""
    _check(_libc.unshare(CLONE_NEWNET))
    _check(_libc.mount(b"/proc/thread-self/ns/net", os.fsencode(path), b"none", MS_BIND, None))


def _unmount(path: Path) -> None:
    if _libc.umount2(os.fsencode(path), MNT_DETACH) and ctypes.get_errno() != errno.EINVAL:  # EINVAL: not mounted
        _check(-1)


def _mounts_stay_private() -> bool:
    """Return whether this process only receives the mounts of others (mount_namespaces(7): a slave).

    ``ip netns exec`` gives its program such a copy of /run/netns; what is mounted there, nobody else can enter by name.
    """
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split(" - ")[0].split()
        if fields[4] == str(DIRECTORY):
            return any(field.startswith("master:") for field in fields[6:])
    return False


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
