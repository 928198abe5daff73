import ctypes
import gc
import os
import socket
import threading

import numpy as np
import pytest

from dataplane.batch import make_batch
from dataplane.devices.device import DeviceError, interface_mac, interface_mtu, translated
from dataplane.devices.io import MAX_SOCKETS, MSG, MSG_WORDS, RX, IoBuffers
from dataplane.devices.memory import load, unload
from dataplane.devices.syscalls import EAGAIN, EINTR, EINVAL, EIO, EMSGSIZE, ENOBUFS, errno, read, require, write
from dataplane.devices.vxlan_socket import VxlanSocket
from dataplane.jit import address, kernel


@kernel
def read_or_error(fd, data):
    got = read(fd, address(data, 0), len(data))
    return got if got >= 0 else -errno()


@kernel
def write_or_error(fd, data):
    put = write(fd, address(data, 0), len(data))
    return put if put >= 0 else -errno()


@pytest.fixture
def pipe():
    reader, writer = os.pipe()
    yield reader, writer
    os.close(reader)
    os.close(writer)


def test_a_kernel_reads_and_writes_a_file(pipe):
    reader, writer = pipe
    out, back = np.frombuffer(b"hello", np.uint8).copy(), np.zeros(8, np.uint8)
    assert write_or_error(writer, out) == 5
    assert read_or_error(reader, back) == 5
    assert back.tobytes() == b"hello\0\0\0"


def test_a_kernel_learns_why_a_call_failed(pipe):
    data = np.zeros(8, np.uint8)
    os.set_blocking(pipe[0], False)
    assert read_or_error(pipe[0], data) == -EAGAIN
    assert read_or_error(1 << 20, data) == -9  # EBADF


def test_each_thread_has_its_own_errno(pipe):
    os.set_blocking(pipe[0], False)
    data, seen = np.zeros(8, np.uint8), []
    assert read_or_error(1 << 20, data) == -9
    worker = threading.Thread(target=lambda: seen.append(read_or_error(pipe[0], np.zeros(8, np.uint8))))
    worker.start()
    worker.join()
    assert seen == [-EAGAIN]


def test_a_function_that_libc_has_not_is_refused_at_import():
    require("sendmmsg")
    with pytest.raises(ImportError, match="no function 'no_such_call'"):
        require("no_such_call")


def test_error_numbers_are_those_of_this_system():
    import errno as system

    named = {"EAGAIN": EAGAIN, "EINTR": EINTR, "EINVAL": EINVAL, "EIO": EIO, "EMSGSIZE": EMSGSIZE, "ENOBUFS": ENOBUFS}
    assert {name: getattr(system, name) for name in named} == named


def test_the_layouts_are_those_of_this_system():
    class Iovec(ctypes.Structure):
        _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))

    class Msghdr(ctypes.Structure):
        _fields_ = (
            ("name", ctypes.c_void_p),
            ("name_length", ctypes.c_uint),
            ("iov", ctypes.c_void_p),
            ("iovlen", ctypes.c_size_t),
            ("control", ctypes.c_void_p),
            ("control_length", ctypes.c_size_t),
            ("flags", ctypes.c_int),
        )

    class Mmsghdr(ctypes.Structure):
        _fields_ = (("header", Msghdr), ("length", ctypes.c_uint))

    assert ctypes.sizeof(Iovec) == 16
    assert ctypes.sizeof(Mmsghdr) == MSG_WORDS * 8
    fields = (Msghdr.name_length, Msghdr.iov, Msghdr.iovlen, Msghdr.control, Msghdr.control_length, Msghdr.flags)
    assert [field.offset for field in fields] == [8, 16, 24, 32, 40, 48]
    assert Mmsghdr.length.offset == 56


def test_p7_the_buffers_are_described_anew_for_each_call_and_live_as_long_as_their_owner():
    device, batch = VxlanSocket("127.0.0.1", port=0, buckets=0), make_batch()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        for text in (b"first", b"second"):
            sender.sendto(text, ("127.0.0.1", device.port))
            batch = make_batch()  # the one before is gone: no address of it may be left
            gc.collect()
            assert device.recv(batch) == 1
            assert unload(batch, 0).endswith(text)
    words = device._buffers().words
    iovec = int(words[MSG + RX * MSG_WORDS + 2])
    assert words.ctypes.data <= iovec < words.ctypes.data + words.nbytes
    device.close()


def test_no_more_sockets_than_there_is_room_for():
    with pytest.raises(ValueError, match="at most 64"):
        IoBuffers().use_tunnel(0x7F000001, 4789, range(MAX_SOCKETS + 1))
    with pytest.raises(ValueError, match="at most 64"):
        VxlanSocket("127.0.0.1", port=0, buckets=MAX_SOCKETS + 1)


def test_an_error_says_which_device_what_for_and_what_it_needs():
    with pytest.raises(DeviceError) as caught, translated("dt0", "open", "CAP_NET_ADMIN"):
        os.close(os.open("/", os.O_WRONLY))
    assert str(caught.value) == "dt0: open: Is a directory"
    assert caught.value.capability == ""
    with pytest.raises(DeviceError) as caught, translated("dt0", "open", "CAP_NET_ADMIN"):
        raise PermissionError(1, "Operation not permitted")
    assert str(caught.value) == "dt0: open: needs CAP_NET_ADMIN"
    assert (caught.value.errno, caught.value.device, caught.value.capability) == (1, "dt0", "CAP_NET_ADMIN")


def test_an_address_that_is_not_ours_is_named():
    with pytest.raises(DeviceError, match=r"vxlan 198\.51\.100\.1:4789: bind: Cannot assign requested address"):
        VxlanSocket("198.51.100.1")


def test_what_the_system_knows_of_an_interface_can_be_read():
    assert (interface_mtu("lo"), interface_mac("lo")) == (65536, 0)
    with pytest.raises(OSError, match="at most 15 bytes"):
        interface_mtu("a-name-too-long-for-linux")


def test_a_frame_larger_than_any_slot_is_not_loaded():
    with pytest.raises(ValueError, match="a slot has"):
        load(make_batch(), [bytes(70000)], 1)
