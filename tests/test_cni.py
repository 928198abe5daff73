"""Attachments as values: what ADD makes and tells the runtime, what CHECK and GC compare, what the file keeps."""

import json
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.cni import (
    ATTACHMENTS,
    EXISTS,
    INVALID_CONFIG,
    INVALID_ENVIRONMENT,
    MISMATCH,
    TRY_AGAIN_LATER,
    UNKNOWN_CONTAINER,
    VERSIONS,
    CniError,
    Request,
    request,
)
from dataplane.control import cni
from dataplane.control.cni import Attachment, Seen
from dataplane.control.state import DesiredState, Dns, Node, Pod, PodNetwork, host_interface, pod_mac

ADDRESS = IPv4Address("10.244.1.7")
STATE = DesiredState(
    node=Node("node1"),
    pod_network=PodNetwork(cidrs=(IPv4Network("10.244.1.0/24"),), mtu=1400),
    pods=(Pod("web", "default", "web", (IPv4Address("10.244.1.5"),), 0x02_00_00_00_00_05, 1400, "cali1"),),
)
GATEWAY = STATE.pod_network.gateway
ONE = Attachment("net", "c1", "eth0", "/run/netns/c1", 11, "shop", "cart-0", ADDRESS, 0x02_00_00_00_00_07)
TWO = replace(ONE, container="c2", netns="/run/netns/c2", cookie=12, name="cart-1", address=ADDRESS + 1)


def asked(command: str = "ADD", container: str = "c1", *, args: str = "", version: str = "1.1.0", **keys) -> Request:
    environment = {
        "CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_NETNS": f"/run/netns/{container}",
        "CNI_IFNAME": keys.pop("ifname", "eth0"), "CNI_ARGS": args,
    }  # fmt: skip
    return request(environment, {"cniVersion": version, "name": "net", **keys})


def draft(wanted: Request, *attached: Attachment, cookie: int = 21, drafts=()) -> cni.Draft:
    return cni.draft(wanted, cookie, {each.key: each for each in attached}, drafts, STATE)


def refused(code: int, *arguments, **keys) -> str:
    with pytest.raises(CniError) as caught:
        draft(*arguments, **keys)
    assert caught.value.code == code
    return str(caught.value)


# --- ADD -------------------------------------------------------------------------------------------------------------


def test_a_pod_has_the_name_that_kubernetes_gives_it():
    made = draft(asked(args="IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=1")).attachment
    assert made.id == "shop/cart-0"
    assert made.mac == pod_mac("shop", "cart-0")
    assert made.key == ("net", "c1", "eth0")


def test_a_container_without_pod_has_its_id_for_a_name():
    assert draft(asked()).attachment.id == "default/c1"
    assert draft(asked(args="K8S_POD_NAME=mine")).attachment.id == "default/mine"


@pytest.mark.parametrize("args", ["K8S_POD_NAME=a/b", "K8S_POD_NAMESPACE=-x", f"K8S_POD_NAME={'a' * 254}"])
def test_a_bad_pod_name_is_refused(args):
    assert "CNI_ARGS" in refused(INVALID_ENVIRONMENT, asked(args=args))


def test_what_is_attached_already_is_refused():
    refused(EXISTS, asked(), ONE)
    refused(EXISTS, asked(container="c3", args="K8S_POD_NAME=other"), ONE, cookie=ONE.cookie)
    refused(EXISTS, asked(ifname="eth1", args="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0"), ONE)


def test_a_pod_of_the_nodes_file_is_not_taken_over():
    assert "the node's file" in refused(EXISTS, asked(args="K8S_POD_NAME=web"))


def test_what_is_being_attached_comes_first():
    first = draft(asked(args="K8S_POD_NAME=a"))
    refused(TRY_AGAIN_LATER, asked(container="c2", args="K8S_POD_NAME=a"), drafts=[first], cookie=22)
    refused(TRY_AGAIN_LATER, asked(container="c2", args="K8S_POD_NAME=b"), drafts=[first])
    assert draft(asked(container="c2", args="K8S_POD_NAME=b"), drafts=[first], cookie=22).replaces == ()


def test_a_new_sandbox_of_a_pod_replaces_the_one_before():
    made = draft(asked(container="c9", args="K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0"), ONE, TWO)
    assert made.replaces == (ONE,)


def test_a_namespace_that_is_another_one_by_now_replaces_what_was_at_its_path():
    gone = replace(TWO, netns="/run/netns/c1")
    assert draft(asked(), gone).replaces == (gone,)


def test_a_plugin_that_comes_second_in_its_list_is_refused():
    refused(INVALID_CONFIG, asked(prevResult={}))


@pytest.mark.parametrize(
    ("keys", "address", "mac"),
    [({}, None, pod_mac("default", "c1")),
     ({"runtimeConfig": {"ips": ["10.244.1.9/24"], "mac": "02:00:00:00:00:0A"}}, ADDRESS + 2, 0x02000000000A),
     ({"runtimeConfig": {"ips": ["10.244.1.9"], "mac": ""}}, ADDRESS + 2, pod_mac("default", "c1")),
     ({"args": "IP=10.244.1.9;MAC=02:00:00:00:00:0a"}, ADDRESS + 2, 0x02000000000A),
     ({"runtimeConfig": None}, None, pod_mac("default", "c1"))],
)  # fmt: skip
def test_an_address_and_a_mac_can_be_asked_for(keys, address, mac):
    made = draft(asked(**keys))
    assert (made.requested, made.attachment.mac) == (address, mac)


@pytest.mark.parametrize(
    "wish",
    [{"ips": ["fd00::1"]}, {"ips": ["10.244.1.9", "10.244.1.10"]}, {"ips": "10.244.1.9"}, {"ips": [9]}, {"ips": ["x"]},
     {"mac": "02:00"}, {"mac": "01:00:00:00:00:01"}, {"mac": "00:00:00:00:00:00"}, {"mac": 2}, "ips"],
    ids=repr,
)  # fmt: skip
def test_a_wish_that_makes_no_sense_is_refused(wish):
    refused(INVALID_CONFIG, asked(runtimeConfig=wish))


def test_an_attachment_is_a_pod_of_the_node():
    state = cni.over(STATE, [ONE, TWO])
    assert state.pods[0] is STATE.pods[0]
    pod = state.pods[1]
    assert (pod.id, pod.addresses, pod.mtu, pod.ifname, pod.cookie) == ("shop/cart-0", (ADDRESS,), 1400, "eth0", 11)
    assert pod.interface == host_interface("cali", "shop", "cart-0")
    assert cni.over(STATE, []) is STATE


# --- the result ------------------------------------------------------------------------------------------------------

INTERFACE = {"name": "eth0", "mac": "02:00:00:00:00:07", "sandbox": "/run/netns/c1"}
IP = {"address": "10.244.1.7/32", "gateway": "169.254.1.1", "interface": 0}


@pytest.mark.parametrize("version", VERSIONS)
def test_each_version_has_its_form_of_the_result(version):
    assert cni.result(asked(version=version), ONE, STATE) == {
        "cniVersion": version,
        "interfaces": [INTERFACE | ({"mtu": 1400} if version == "1.1.0" else {})],
        "ips": [IP | ({"version": "4"} if version < "1.0.0" else {})],
        "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}],
        "dns": {},
    }


def test_the_result_names_the_clusters_dns_unless_the_network_does():
    state = replace(STATE, dns=Dns(IPv4Address("10.96.0.10"), "cluster.example"))
    assert cni.result(asked(), ONE, state)["dns"] == {
        "nameservers": ["10.96.0.10"],
        "domain": "cluster.example",
        "search": ["shop.svc.cluster.example", "svc.cluster.example", "cluster.example"],
        "options": ["ndots:5"],
    }
    assert cni.result(asked(dns={"nameservers": ["192.0.2.1"]}), ONE, state)["dns"] == {"nameservers": ["192.0.2.1"]}


# --- CHECK -----------------------------------------------------------------------------------------------------------

SEEN = Seen(
    True, ONE.mac, 1400, frozenset({ADDRESS, IPv6Address("fe80::1")}),
    frozenset({(IPv4Network("0.0.0.0/0"), GATEWAY), (IPv4Network("169.254.1.1/32"), None)}),
)  # fmt: skip


def checked(previous: object, attachment: Attachment | None = ONE) -> None:
    assert cni.require_listed(asked("CHECK", prevResult=previous), attachment) == attachment


@pytest.mark.parametrize("version", VERSIONS[2:])
def test_check_passes_with_the_result_of_add_and_what_others_added_to_it(version):
    result = cni.result(asked(version=version), ONE, STATE)
    checked(result)
    more = {"name": "veth7", "mac": "02:00:00:00:00:99"}
    checked(result | {"interfaces": [more, *result["interfaces"]], "ips": [{"address": "fd00::1/64"}, *result["ips"]]})
    checked(result | {"interfaces": [{**INTERFACE, "mac": INTERFACE["mac"].upper()}]})


@pytest.mark.parametrize(
    ("change", "code"),
    [({"interfaces": []}, MISMATCH), ({"ips": []}, MISMATCH), ({"interfaces": None}, MISMATCH),
     ({"interfaces": [INTERFACE | {"name": "eth1"}]}, MISMATCH), ({"ips": [IP | {"address": "10.0.0.8/32"}]}, MISMATCH),
     ({"interfaces": [INTERFACE | {"sandbox": "/run/netns/c2"}]}, MISMATCH), ({"interfaces": 7}, INVALID_CONFIG),
     ({"interfaces": [INTERFACE | {"mac": "02:00:00:00:00:08"}]}, MISMATCH), ({"ips": [7]}, INVALID_CONFIG)],
)  # fmt: skip
def test_check_fails_when_the_runtime_remembers_something_else(change, code):
    with pytest.raises(CniError) as caught:
        checked(cni.result(asked(), ONE, STATE) | change)
    assert caught.value.code == code


@pytest.mark.parametrize(("previous", "attachment", "code"), [
    (None, ONE, INVALID_CONFIG), ([], ONE, INVALID_CONFIG), ({}, None, UNKNOWN_CONTAINER), ({}, TWO, MISMATCH),
])  # fmt: skip
def test_check_needs_the_container_and_its_result(previous, attachment, code):
    with pytest.raises(CniError) as caught:
        checked(previous, attachment)
    assert caught.value.code == code


def test_check_passes_when_the_interface_is_as_it_was_made_or_has_more():
    cni.require_as_made(ONE, STATE.pod_network, SEEN)
    more = SEEN.routes | {(IPv4Network("192.0.2.0/24"), GATEWAY)}
    cni.require_as_made(ONE, STATE.pod_network, replace(SEEN, routes=more))


@pytest.mark.parametrize(
    ("seen", "words"),
    [(None, "the interface is gone"), (replace(SEEN, up=False), "it is down"), (replace(SEEN, mtu=1500), "MTU is 1500"),
     (replace(SEEN, mac=1), "MAC is 00:00:00:00:00:01"), (replace(SEEN, addresses=frozenset()), "no address 10"),
     (replace(SEEN, routes=frozenset()), "no default route"),
     (replace(SEEN, routes=frozenset({(IPv4Network("0.0.0.0/0"), ADDRESS)})), "no default route"),
     (replace(SEEN, up=False, mtu=1), "it is down; its MTU is 1")],
)  # fmt: skip
def test_check_names_what_differs(seen, words):
    with pytest.raises(CniError, match=words) as caught:
        cni.require_as_made(ONE, STATE.pod_network, seen)
    assert caught.value.code == MISMATCH


# --- GC --------------------------------------------------------------------------------------------------------------


def collected(listed: object) -> list[Attachment]:
    elsewhere = replace(TWO, network="another")
    attached = {each.key: each for each in (ONE, TWO, elsewhere)}
    keys: dict[str, Any] = {ATTACHMENTS: listed}
    return cni.stale(asked("GC", **keys), attached)


def test_gc_finds_what_the_runtime_does_not_list():
    assert collected([]) == [ONE, TWO]
    assert collected([{"containerID": "c1", "ifname": "eth0"}]) == [TWO]
    assert collected([{"containerID": "c1", "ifname": "eth1"}, {"containerID": "c2", "ifname": "eth0"}]) == [ONE]


def test_gc_reads_a_list_of_anything():
    assert collected([{"containerID": ["c1"], "ifname": {}}, {}]) == [ONE, TWO]


def test_gc_takes_null_for_the_list_of_a_runtime_that_has_no_container_left():
    assert collected(None) == [ONE, TWO]


@pytest.mark.parametrize("listed", [{}, [1], "c1", "missing"])
def test_gc_without_a_list_removes_nothing(listed):
    with pytest.raises(CniError) as caught:
        collected(listed)
    assert caught.value.code == INVALID_CONFIG


def test_gc_that_does_not_say_what_is_valid_removes_nothing():
    with pytest.raises(CniError) as caught:
        cni.stale(asked("GC"), {ONE.key: ONE})
    assert caught.value.code == INVALID_CONFIG


# --- the books -------------------------------------------------------------------------------------------------------

words = st.from_regex(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,20}", fullmatch=True)
attachments = st.builds(
    Attachment, words, words, words, st.text(), st.integers(1, 1 << 64), words, words, st.ip_addresses(v=4),
    st.integers(0, (1 << 48) - 1),
)  # fmt: skip


@given(st.lists(attachments))
def test_what_is_written_is_read(given):
    assert cni.read(cni.written(given, "boot"), "boot") == (given, [])


def test_nothing_of_another_boot_is_read():
    assert cni.read(cni.written([ONE], "before"), "now") == ([], [])


def some_json(inner):
    return st.lists(inner) | st.dictionaries(st.sampled_from(["boot", "attachments", "address", "mac"]), inner)


@given(st.text() | st.recursive(st.none() | st.integers() | st.text(), some_json).map(json.dumps))
def test_a_file_of_anything_is_read_without_an_error(text):
    found, problems = cni.read(text, "boot")
    assert found == []
    assert all(isinstance(line, str) for line in problems)


def test_an_entry_that_makes_no_sense_is_left_out_and_named():
    content = json.loads(cni.written([ONE, TWO], "boot"))
    for key, value in (("cookie", "11"), ("address", "10.244.1"), ("netns", 7)):
        broken = json.loads(json.dumps(content))
        broken["attachments"][0][key] = value
        found, problems = cni.read(json.dumps(broken), "boot")
        assert found == [TWO]
        assert problems[0].startswith("entry 1 is unreadable")


@given(words, words, words, words)
def test_a_handle_says_whose_it_is(node, network, container, ifname):
    handle = cni.handle_of(node, (network, container, ifname))
    assert cni.key_of_handle(node, handle) == (network, container, ifname)
    assert cni.key_of_handle(node + "x", handle) is None
    assert cni.key_of_handle(node, f"vxlan-tunnel-addr-{node}") is None
