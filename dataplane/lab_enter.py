"""Entering a lab's namespace for good, just before another program takes our place.

Cluster DNS is asked through /etc/resolv.conf. Pods share the machine's files, so a program in a pod gets a mount
namespace of its own, in which that one file is another; nothing of it is seen outside, or left when the program ends.
"""

import ctypes
import os
import sys
from contextlib import suppress
from pathlib import Path

from dataplane.devices.namespace import CLONE_NEWNET, DIRECTORY, MS_BIND, MS_REC, NamespaceError, namespace_path
from dataplane.lab_look import place
from dataplane.lab_plan import Plan

CLONE_NEWNS = 0x20000
MS_SLAVE = 1 << 19  # mounts made outside are seen inside, such as namespaces that nodes make; not the other way round
RESOLV_CONF = Path("/etc/resolv.conf")

_libc = ctypes.CDLL(None, use_errno=True)


def enter(plan: Plan, short: str) -> None:
    """Move this process into the namespace of a node, a pod, the client or the LAN.

    Raises:
        LabError: There is no such thing.
        NamespaceError: It is not there now, or we may not enter it.
    """
    path = namespace_path(place(plan, short))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NamespaceError(str(path), "open", error.errno or 0) from error
    if _libc.setns(fd, CLONE_NEWNET):
        raise NamespaceError(str(path), "enter", ctypes.get_errno())
    os.close(fd)
    pod = next((pod for pod in plan.pods if pod.name == short), None)
    if pod is not None and plan.dns:
        _resolve(plan, pod.namespace)
    if any(node.name == short for node in plan.nodes):
        os.environ["DATAPLANE_SOCKET"] = str(plan.socket(short))
    own = Path(sys.executable).parent  # where our console script is, if it was installed
    os.environ["PATH"] = f"{os.environ.get('PATH', os.defpath)}:{own}"


def _resolve(plan: Plan, namespace: str) -> None:
    """Give this process the resolv.conf that a kubelet gives a pod."""
    file = write_resolv_conf(plan, namespace)
    _check(_libc.unshare(CLONE_NEWNS), "unshare mounts")
    _check(_libc.mount(None, b"/", None, MS_SLAVE | MS_REC, None), "keep mounts")
    with suppress(FileNotFoundError):  # a machine without the file has nobody who reads it
        target = RESOLV_CONF.resolve(strict=True)
        _check(_libc.mount(os.fsencode(file), os.fsencode(target), None, MS_BIND, None), "mount resolv.conf")


def write_resolv_conf(plan: Plan, namespace: str) -> Path:
    """Write the resolv.conf of a namespace's pods; a program that has an earlier one mounted keeps that as it is."""
    file = plan.folder / f"resolv.{namespace}.conf"
    draft = plan.folder / f"{file.name}.{os.getpid()}"
    searched = [f"{namespace}.svc.{plan.domain}", f"svc.{plan.domain}", plan.domain]
    draft.write_text(f"nameserver {plan.dns}\nsearch {' '.join(searched)}\noptions ndots:5\n")
    os.replace(draft, file)
    return file


def _check(result: int, operation: str) -> None:
    if result:
        raise NamespaceError(str(DIRECTORY), operation, ctypes.get_errno())
