"""Looking into the namespaces of containers: what ADD and CHECK need to know. Nothing is made here."""

import errno

from dataplane.cni import EXISTS, INVALID_ENVIRONMENT, UNKNOWN_CONTAINER, CniError
from dataplane.control.cni import Attachment, Seen
from dataplane.devices import namespace
from dataplane.devices.namespace import NamespaceError


def examine(path: str, interface: str, cookie: int = 0) -> int:
    """Check that a namespace is there, this one if a cookie is given, and has no such interface; return its cookie.

    Raises:
        NamespaceError: It is not, or has.
    """
    handle = namespace.known_namespace(path, cookie)
    try:
        namespace.require_free(handle, interface)
        return handle.cookie
    finally:
        namespace.remove_namespace(handle)


def admit(path: str, interface: str) -> int:
    """Return the cookie of the namespace that a container is to be connected in.

    Raises:
        CniError: There is none, it is the node's own, or it has such an interface.
    """
    try:
        cookie = examine(path, interface)
    except NamespaceError as error:
        if error.errno == errno.EEXIST:
            raise CniError(EXISTS, str(error)) from None
        missing = error.errno in (errno.ENOENT, errno.ENOTDIR)
        raise CniError(UNKNOWN_CONTAINER if missing else INVALID_ENVIRONMENT, f"CNI_NETNS: {error}") from None
    if cookie == namespace.current_cookie():
        raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS: {path}: it is the node's own namespace")
    return cookie


def look(attachment: Attachment) -> Seen | None:
    """Return what a container's interface is like; None when it is gone.

    Raises:
        CniError: The namespace is gone.
    """
    try:
        handle = namespace.known_namespace(attachment.netns, attachment.cookie)
        try:
            found = namespace.look(handle, attachment.ifname)
        finally:
            namespace.remove_namespace(handle)
    except NamespaceError as error:
        raise CniError(UNKNOWN_CONTAINER, f"CNI_NETNS: {error}") from None
    if found is None:
        return None
    link = found.link
    return Seen(link.up, link.mac, link.mtu, frozenset(each.ip for each in link.addresses), found.routes)
