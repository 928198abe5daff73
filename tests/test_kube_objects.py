"""Objects as the API's documentation shows them, and what they become here."""

from contextlib import suppress
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataplane.control import kube_objects as objects
from dataplane.control.cluster import ClusterNode, ClusterPod
from dataplane.control.kube_objects import KubeSlice, merged
from dataplane.control.kube_watch import ObjectError, Shelf
from dataplane.control.services import Surroundings as Around
from dataplane.control.services import build
from dataplane.control.state import AddressPool, Endpoint, L2Advertisement, Selector, Service, ServicePort

# --- nodes, pods -----------------------------------------------------------------------------------------------------

NODE: dict[str, Any] = {
    "kind": "Node",
    "metadata": {
        "name": "node1",
        "uid": "6a1c",
        "resourceVersion": "812",
        "creationTimestamp": "2026-01-02T03:04:05Z",
        "labels": {"kubernetes.io/hostname": "node1", "topology.kubernetes.io/zone": "z1"},
        "annotations": {"node.alpha.kubernetes.io/ttl": "0"},
    },
    "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24", "fd00:1::/64"], "taints": None},
    "status": {
        "addresses": [
            {"type": "InternalIP", "address": "192.0.2.11"},
            {"type": "InternalIP", "address": "2001:db8::11"},
            {"type": "ExternalIP", "address": "203.0.113.11"},
            {"type": "Hostname", "address": "node1"},
        ],
        "conditions": [
            {"type": "MemoryPressure", "status": "False"},
            {"type": "NetworkUnavailable", "status": "False"},
            {"type": "Ready", "status": "True"},
        ],
    },
}


def with_(item: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Return an object with one more, or another, value."""
    first, _, rest = path.partition(".")
    return {**item, first: with_(item.get(first) or {}, rest, value) if rest else value}


def test_a_node_has_its_internal_addresses_and_its_blocks():
    assert objects.node_of(NODE) == (
        ClusterNode(
            name="node1",
            addresses=(ip_address("192.0.2.11"),),
            pod_cidrs=(ip_network("10.244.1.0/24"),),
            zone="z1",
            labels=(("kubernetes.io/hostname", "node1"), ("topology.kubernetes.io/zone", "z1")),
            since=1767323045.0,
        ),
        "",
    )


@pytest.mark.parametrize(("status", "alive"), [("True", True), ("False", False), ("Unknown", False), (None, False)])
def test_a_node_is_alive_while_it_is_ready(status, alive):
    conditions = [{"type": "Ready", "status": status}] if status else []
    assert objects.node_of(with_(NODE, "status.conditions", conditions))[0].alive == alive


def test_a_node_without_a_network_announces_nothing():
    node, _ = objects.node_of(with_(NODE, "status.conditions", [{"type": "NetworkUnavailable", "status": "True"}]))
    assert not node.announces


def test_calicos_annotations_say_the_tunnels_address_and_mac():
    annotations = {
        "projectcalico.org/IPv4VXLANTunnelAddr": "10.244.1.192",
        "projectcalico.org/VXLANTunnelMACAddr": "66:0a:0b:0c:0d:0e",
    }
    node, complaint = objects.node_of(with_(NODE, "metadata.annotations", annotations))
    assert node.pod_cidrs == (ip_network("10.244.1.192/32"), ip_network("10.244.1.0/24"))
    assert (node.vtep_mac, complaint) == (0x660A0B0C0D0E, "")
    first = {"projectcalico.org/IPv4VXLANTunnelAddr": "10.244.1.0"}
    assert objects.node_of(with_(NODE, "metadata.annotations", first))[0].pod_cidrs == (ip_network("10.244.1.0/24"),)


def test_what_is_wrong_with_a_node_is_left_out_and_named():
    broken = with_(with_(NODE, "spec.podCIDRs", ["10.244.1.1/24", 7]), "status.addresses", [
        {"type": "InternalIP", "address": "127.0.0.1"}, {"type": "InternalIP", "address": "192.0.2.11"}, 3,
    ])  # fmt: skip
    node, complaint = objects.node_of(broken)
    assert (node.addresses, node.pod_cidrs) == ((ip_address("192.0.2.11"),), ())
    assert complaint == (
        "podCIDR: 10.244.1.1/24 has host bits set; podCIDR: expected an IP prefix (got 7); "
        "InternalIP: nobody can have the address 127.0.0.1"
    )


POD: dict[str, Any] = {
    "metadata": {"name": "web-0", "namespace": "default"},
    "spec": {"nodeName": "node1"},
    "status": {"phase": "Running", "podIP": "10.244.1.5", "podIPs": [{"ip": "10.244.1.5"}, {"ip": "fd00::5"}]},
}


@pytest.mark.parametrize("phase", ["Pending", "Running", "Succeeded", "Failed"])
def test_a_pod_has_addresses_until_it_has_ended(phase):
    addresses = () if phase in ("Succeeded", "Failed") else (ip_address("10.244.1.5"),)
    pod, _ = objects.pod_of(with_(POD, "status.phase", phase))
    assert pod == ClusterPod("web-0", "default", "node1", addresses)
    assert objects.pod_of(with_(POD, "status", {}))[0].addresses == ()


# --- services --------------------------------------------------------------------------------------------------------

SERVICE: dict[str, Any] = {
    "metadata": {
        "name": "web",
        "namespace": "shop",
        "uid": "77",
        "resourceVersion": "900",
        "labels": {"app": "web"},
        "annotations": {"metallb.io/address-pool": "public"},
    },
    "spec": {
        "type": "LoadBalancer",
        "clusterIP": "10.96.0.20",
        "clusterIPs": ["10.96.0.20", "fd00::20"],
        "ipFamilies": ["IPv4", "IPv6"],
        "ipFamilyPolicy": "PreferDualStack",
        "externalIPs": ["203.0.113.20"],
        "selector": {"app": "web"},
        "ports": [
            {
                "name": "http",
                "protocol": "TCP",
                "appProtocol": "http",
                "port": 80,
                "targetPort": "web",
                "nodePort": 30080,
            },
            {"name": "dns", "protocol": "UDP", "port": 53, "targetPort": 5353, "nodePort": 30053},
        ],
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 600}},
        "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Local",
        "healthCheckNodePort": 30180,
        "loadBalancerSourceRanges": [" 203.0.113.0/24 ", "198.51.100.7/24"],
        "loadBalancerIP": "192.0.2.200",
        "publishNotReadyAddresses": True,
        "allocateLoadBalancerNodePorts": True,
    },
    "status": {
        "loadBalancer": {
            "ingress": [
                {"ip": "192.0.2.200", "ipMode": "VIP"},
                {"ip": "192.0.2.201", "ipMode": "Proxy"},
                {"hostname": "lb.example.net"},
            ]
        }
    },
}


def test_a_service_has_every_field_that_matters():
    found, complaint = objects.service_of(SERVICE)
    assert (found.uid, found.version, found.held, complaint) == ("77", "900", (ip_address("192.0.2.200"),), "")
    assert found.service == Service(
        name="web",
        namespace="shop",
        type="LoadBalancer",
        cluster_ips=(ip_address("10.96.0.20"),),
        external_ips=(ip_address("203.0.113.20"),),
        load_balancer_ips=(ip_address("192.0.2.200"),),
        ports=(
            ServicePort(80, "TCP", "http", "http/TCP", 30080),
            ServicePort(53, "UDP", "dns", "dns/UDP", 30053),
        ),
        affinity_seconds=600,
        external_policy="Local",
        internal_policy="Local",
        source_ranges=(ip_network("203.0.113.0/24"), ip_network("198.51.100.0/24")),
        health_check_node_port=30180,
        publish_not_ready=True,
        origin="kubernetes",
        labels=(("app", "web"),),
        annotations=(("metallb.io/address-pool", "public"),),
        requested_ip=ip_address("192.0.2.200"),
        family_policy="PreferDualStack",
        selector=(("app", "web"),),
    )


def test_defaults_are_those_of_the_api():
    item = {"metadata": {"name": "a", "namespace": "b"}, "spec": {"clusterIP": "10.96.0.9", "ports": [{"port": 80}]}}
    found = objects.service_of(item)[0].service
    assert found == Service(
        "a",
        "b",
        cluster_ips=(ip_address("10.96.0.9"),),
        ports=(ServicePort(80, "TCP", "", "/TCP"),),
        origin="kubernetes",
    )
    sticky = objects.service_of(with_(item, "spec.sessionAffinity", "ClientIP"))[0].service
    assert sticky.affinity_seconds == 10800


def test_headless_and_external_name_services_have_no_address():
    headless = with_(with_(SERVICE, "spec.clusterIP", "None"), "spec.clusterIPs", ["None"])
    assert objects.service_of(headless)[0].service.cluster_ips == ()
    item = {
        "metadata": {"name": "a", "namespace": "b"},
        "spec": {"type": "ExternalName", "externalName": "www.example.net"},
    }
    found = objects.service_of(item)[0].service
    assert (found.type, found.external_name, found.cluster_ips) == ("ExternalName", "www.example.net", ())


def test_a_service_of_another_proxy_keeps_nothing_but_its_name_and_cluster_ip():
    label = {"service.kubernetes.io/service-proxy-name": "other"}
    found = objects.service_of(with_(SERVICE, "metadata.labels", label))[0].service
    assert found.cluster_ips == (ip_address("10.96.0.20"),)
    assert (found.ports, found.external_ips, found.load_balancer_ips, found.health_check_node_port) == ((), (), (), 0)
    assert build(found, Around("node1", (), (ip_address("192.0.2.11"),), "rr", frozenset())) == []


def test_addresses_of_a_status_count_only_for_a_load_balancer():
    found, _ = objects.service_of(with_(SERVICE, "spec.type", "NodePort"))
    assert (found.held, found.service.load_balancer_ips) == ((), ())


def test_a_class_is_told():
    assert objects.service_of(with_(SERVICE, "spec.loadBalancerClass", "x/y"))[0].service.load_balancer_class == "x/y"


def test_a_port_of_sctp_is_known_by_name_and_carries_nothing():
    ports = [{"name": "a", "protocol": "SCTP", "port": 80}, {"name": "b", "port": 81}]
    found = objects.service_of(with_(SERVICE, "spec.ports", ports))[0].service
    assert [port.protocol for port in found.ports] == ["SCTP", "TCP"]
    servers = build(found, Around("node1", (), (), "rr", frozenset()))
    assert {each.key.port for each in servers} == {81}


@pytest.mark.parametrize(
    ("path", "value", "text"),
    [
        ("spec.type", "Magic", "type is 'Magic'"),
        ("spec.ports", [{"port": 0}], "port: expected a port number"),
        ("spec.ports", [{"port": 80, "protocol": "GRE"}], "port: protocol is 'GRE'"),
        ("spec.externalIPs", ["224.0.0.1"], "externalIP: nobody can have the address 224.0.0.1"),
        ("spec.clusterIPs", ["x"], "clusterIP: 'x' does not appear to be an IPv4 or IPv6 address"),
        ("spec.loadBalancerIP", "0.0.0.0", "loadBalancerIP: nobody can have the address 0.0.0.0"),
    ],
)
def test_what_is_wrong_with_a_service_is_named(path, value, text):
    shelf: Shelf[Any] = Shelf("services", objects.service_of, lambda *_: None)
    assert shelf.read(with_(SERVICE, path, value))[1].complaint == text


# --- endpoint slices -------------------------------------------------------------------------------------------------

SLICE: dict[str, Any] = {
    "metadata": {"name": "web-x7", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
    "addressType": "IPv4",
    "ports": [{"name": "http", "protocol": "TCP", "port": 8080}, {"name": "dns", "protocol": "UDP", "port": 5353}],
    "endpoints": [
        {
            "addresses": ["10.244.1.5", "10.244.1.99"],
            "conditions": {"ready": True, "serving": True, "terminating": False},
            "hostname": "web-0",
            "nodeName": "node1",
            "zone": "z1",
            "targetRef": {"kind": "Pod", "name": "web-0"},
        }
    ],
}
PORTS = (("dns/UDP", 5353), ("http/TCP", 8080))


def test_an_endpoint_has_its_first_address_and_the_ports_of_its_slice():
    found = Endpoint(ip_address("10.244.1.5"), node="node1", zone="z1", ports=PORTS, hostname="web-0")
    assert objects.slice_of(SLICE) == (KubeSlice("shop/web", (found,)), "")


def test_an_endpoint_of_v1beta1_is_the_same():
    old = dict(SLICE["endpoints"][0])
    topology = {"kubernetes.io/hostname": old.pop("nodeName"), "topology.kubernetes.io/zone": old.pop("zone")}
    assert objects.slice_of(with_(SLICE, "endpoints", [old | {"topology": topology}])) == objects.slice_of(SLICE)


CONDITIONS = [
    # ready, serving, terminating      -> ready, serving, terminating
    ({}, (True, True, False)),
    ({"ready": None, "serving": None, "terminating": None}, (True, True, False)),
    ({"ready": False}, (False, False, False)),
    ({"ready": False, "serving": True, "terminating": True}, (False, True, True)),
    ({"ready": True, "serving": False}, (True, False, False)),
]


@pytest.mark.parametrize(("conditions", "expected"), CONDITIONS)
def test_conditions_that_are_not_said_have_the_apis_defaults(conditions, expected):
    item = with_(SLICE, "endpoints", [{"addresses": ["10.244.1.5"], "conditions": conditions}])
    (found,) = objects.slice_of(item)[0].endpoints
    assert (found.ready, found.serving, found.terminating) == expected


@pytest.mark.parametrize("kind", ["IPv6", "FQDN"])
def test_slices_of_other_address_types_and_of_no_service_say_nothing(kind):
    assert objects.slice_of(with_(SLICE, "addressType", kind)) == (KubeSlice(""), "")
    assert objects.slice_of(with_(SLICE, "metadata.labels", {})) == (KubeSlice(""), "")


def test_a_broken_endpoint_does_not_take_the_others_with_it():
    item = with_(SLICE, "endpoints", [{"addresses": []}, *SLICE["endpoints"], {"addresses": ["fd00::1"]}, "x"])
    found, complaint = objects.slice_of(item)
    assert [str(each.address) for each in found.endpoints] == ["10.244.1.5"]
    assert complaint == "endpoint: without an address; endpoint: expected an IPv4 address (got fd00::1)"


def test_a_port_finds_its_number_by_name_and_protocol_and_not_by_the_target_port():
    service = objects.service_of(SERVICE)[0].service
    endpoint = objects.slice_of(SLICE)[0].endpoints
    around = Around("node1", (), (), "rr", frozenset())
    made = build(
        Service("web", "shop", cluster_ips=service.cluster_ips, ports=service.ports, endpoints=endpoint), around
    )
    assert [(str(each.key), each.destinations[0].port) for each in made] == [
        ("10.96.0.20:80/TCP", 8080),
        ("10.96.0.20:53/UDP", 5353),
    ]


def endpoint(address: str = "10.244.1.5", ports: tuple[tuple[str, int], ...] = PORTS, **more: Any) -> Endpoint:
    return Endpoint(ip_address(address), ports=ports, **more)


def test_an_endpoint_in_two_slices_is_one_with_the_better_conditions():
    good, bad = endpoint(node="node1"), endpoint(ready=False, serving=True, terminating=True)
    assert merged([(bad,), (good,)]) == merged([(good,), (bad,)]) == (good,)
    other = endpoint(ports=(("http/TCP", 9090),))
    assert set(merged([(good,), (other,)])) == {good, other}


@given(
    st.lists(
        st.builds(
            endpoint,
            st.sampled_from(["10.244.1.5", "10.244.1.6"]),
            ports=st.sampled_from([PORTS, ()]),
            node=st.sampled_from(["", "node1", "node2"]),
            ready=st.booleans(),
            serving=st.booleans(),
            terminating=st.booleans(),
        ),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_the_order_of_slices_does_not_matter(found, random):
    shuffled = list(found)
    random.shuffle(shuffled)
    assert merged([tuple(found)]) == merged([(each,) for each in shuffled])


# --- MetalLB ---------------------------------------------------------------------------------------------------------


def test_a_pool_has_ranges_and_whom_it_is_for():
    item = {
        "metadata": {"name": "public", "namespace": "metallb-system", "labels": {"tier": "a"}},
        "spec": {
            "addresses": ["192.0.2.200/30", "198.51.100.1 - 198.51.100.9", "fd00::/120"],
            "autoAssign": False,
            "avoidBuggyIPs": True,
            "serviceAllocation": {
                "priority": 50,
                "namespaces": ["shop"],
                "namespaceSelectors": [{"matchLabels": {"team": "a"}}],
                "serviceSelectors": [{"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}],
            },
        },
    }
    found, complaint = objects.pool_of(item)
    assert found.pool == AddressPool(
        "public",
        tuple(
            (ip_address(a), ip_address(b))
            for a, b in [("192.0.2.200", "192.0.2.203"), ("198.51.100.1", "198.51.100.9")]
        ),
        auto_assign=False,
        avoid_buggy_ips=True,
        priority=50,
        namespaces=frozenset({"shop"}),
        service_selectors=(Selector(expressions=(("app", "In", ("web",)),)),),
    )
    assert (found.labels, found.namespace_selectors) == ((("tier", "a"),), (Selector((("team", "a"),)),))
    assert complaint == ""
    complaint = objects.pool_of(with_(item, "spec.addresses", ["9-1", "192.0.2.9-192.0.2.1", 5]))[1]
    assert complaint.count("address: ") == 3


def test_an_advertisement_names_pools_nodes_and_interfaces():
    item = {
        "metadata": {"name": "l2", "namespace": "metallb-system"},
        "spec": {
            "ipAddressPools": ["public"],
            "ipAddressPoolSelectors": [{"matchLabels": {"tier": "a"}}],
            "nodeSelectors": [{"matchLabels": {"rack": "r1"}}],
            "preferredNodeSelectors": [{"weight": 5, "preference": {"matchLabels": {"disk": "ssd"}}}],
            "interfaces": ["eth0"],
        },
    }
    found, _ = objects.advertisement_of(item)
    assert found.advertisement == L2Advertisement(
        "l2",
        pools=frozenset({"public"}),
        node_selectors=(Selector((("rack", "r1"),)),),
        interfaces=frozenset({"eth0"}),
        preferences=((5, Selector((("disk", "ssd"),))),),
    )
    assert found.pool_selectors == (Selector((("tier", "a"),)),)
    with pytest.raises(ObjectError, match="serviceSelectors are not supported"):
        objects.advertisement_of(with_(item, "spec.serviceSelectors", [{}]))
    with pytest.raises(ObjectError, match="operator is 'Near'"):
        objects.advertisement_of(
            with_(item, "spec.nodeSelectors", [{"matchExpressions": [{"key": "a", "operator": "Near"}]}])
        )


# --- anything --------------------------------------------------------------------------------------------------------

CONVERT = [
    (objects.node_of, NODE),
    (objects.pod_of, POD),
    (objects.service_of, SERVICE),
    (objects.slice_of, SLICE),
    (objects.pool_of, {"metadata": {"name": "a"}, "spec": {"addresses": ["192.0.2.0/24"]}}),
    (objects.advertisement_of, {"metadata": {"name": "a"}, "spec": {"nodeSelectors": [{"matchLabels": {"a": "b"}}]}}),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def places(item: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in an object."""
    inside = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    return [path, *(found for key, value in inside for found in places(value, (*path, key)))]


def put(item: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return an object with another value at a path."""
    if not path:
        return value
    copied = dict(item) if isinstance(item, dict) else list(item)
    copied[path[0]] = put(item[path[0]], path[1:], value)
    return copied


@pytest.mark.parametrize(("convert", "item"), CONVERT, ids=lambda each: getattr(each, "__name__", ""))
@given(data=st.data())
def test_whatever_stands_anywhere_in_an_object_is_used_or_named(convert, item, data):
    broken = put(item, data.draw(st.sampled_from(places(item))), data.draw(JSON))
    shelf: Shelf[Any] = Shelf("things", convert, lambda *_: None)
    with suppress(ObjectError):  # without a name there is nothing to call it by
        key, entry = shelf.read(broken)
        shelf.put(key, entry)
        hash(entry.value)
