"""loadbalancer: histories of services and pools, beside an allocator that tries everything."""

from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dataplane.control.loadbalancer import Outcome, allocate, without_given
from dataplane.control.pools import pool_of
from dataplane.control.state import AddressPool, Selector, Service, ServicePort
from tests import naive_loadbalancer as naive
from tests.balanced import addresses, pool, service

NAMES = [(namespace, name) for namespace in ("default", "shop") for name in "abcd"]
IPS = [f"192.0.2.{number}" for number in (0, 1, 2, 3, 9, 254, 255)]
OPTIONAL = st.none()
NOTES = st.fixed_dictionaries(
    {},
    optional={
        "allow-shared-ip": st.sampled_from(["", "k1", "k2"]),
        "address-pool": st.sampled_from(["p1", "p2", "none"]),
        "loadBalancerIPs": st.sampled_from(IPS),
    },
)
PORTS = st.lists(
    st.builds(ServicePort, st.sampled_from([80, 81]), st.sampled_from(["TCP", "UDP"])),
    min_size=1,
    max_size=3,
    unique=True,
)
SERVICES = st.builds(
    lambda where, notes, ports, **more: service(where[1], namespace=where[0], notes=notes, ports=tuple(ports), **more),
    st.sampled_from(NAMES),
    NOTES,
    PORTS,
    labels=st.sampled_from([(), (("app", "web"),)]),
    external_policy=st.sampled_from(["Cluster", "Cluster", "Local"]),
    selector=st.sampled_from([(("app", "x"),), (("app", "y"),)]),
    load_balancer_class=st.sampled_from(["", "", "", "", "other"]),
    load_balancer_ips=st.sampled_from([(), (), (), (), addresses("192.0.2.1")]),
)
RANGES = st.sampled_from(["192.0.2.0-192.0.2.2", "192.0.2.2-192.0.2.3 192.0.2.1", "192.0.2.254-192.0.3.1", "192.0.2.9"])
POOL = st.builds(
    pool,
    RANGES,
    st.just("p"),
    auto_assign=st.sampled_from([True, True, True, False]),
    avoid_buggy_ips=st.booleans(),
    priority=st.integers(0, 3),
    namespaces=st.sampled_from([frozenset[str](), frozenset[str](), frozenset({"shop"})]),
    service_selectors=st.sampled_from([(), (), (Selector((("app", "web"),)),)]),
)


class Histories(RuleBasedStateMachine):
    """Services and pools come, change and go; what one outcome was is held by the next."""

    def __init__(self) -> None:
        super().__init__()
        self.services: dict[str, Service] = {}
        self.pools = [pool("192.0.2.0-192.0.2.3", "p1")]
        self.outcome = Outcome({}, {})

    def settle(self, *changed: str) -> None:
        before, services = self.outcome, list(self.services.values())
        held = without_given(before.addresses, services)
        self.outcome = allocate(services, self.pools, held, changed)
        assert self.outcome.addresses == naive.allocate(services, self.pools, held, changed)
        again = allocate(services, self.pools, self.outcome.addresses)
        assert again == self.outcome

    @rule(new=SERVICES)
    def set_service(self, new: Service) -> None:
        others = {name: each for name, each in self.outcome.addresses.items() if name != new.id}
        self.services[new.id] = new
        self.settle(new.id)
        by_hand = bool(new.load_balancer_ips or new.load_balancer_class)
        # An edit never moves another one's address, unless it is given away by hand.
        assert by_hand or {name: self.outcome.addresses.get(name) for name in others} == others

    @precondition(lambda self: self.services)
    @rule(data=st.data())
    def delete_service(self, data) -> None:
        del self.services[data.draw(st.sampled_from(sorted(self.services)))]
        before = self.outcome.addresses
        self.settle()
        assert all(self.outcome.addresses[name] == before[name] for name in self.services if name in before)

    @precondition(lambda self: self.services)
    @rule(data=st.data(), kind=st.sampled_from(["ClusterIP", "LoadBalancer"]))
    def change_type(self, data, kind) -> None:
        name = data.draw(st.sampled_from(sorted(self.services)))
        self.services[name] = replace(self.services[name], type=kind)
        self.settle(name)

    @rule(pools=st.lists(POOL, max_size=3))
    def change_pools(self, pools: list[AddressPool]) -> None:
        self.pools = [replace(each, name=f"p{number}") for number, each in enumerate(pools, 1)]
        self.settle()

    @invariant()
    def nobody_has_what_is_not_for_it(self) -> None:
        waiting = {each.id for each in self.services.values() if each.type == "LoadBalancer"}
        having = [(self.services[name], each) for name, each in self.outcome.addresses.items()]
        assert not self.outcome.addresses.keys() & self.outcome.refusals.keys()
        assert self.outcome.addresses.keys() | self.outcome.refusals.keys() <= waiting
        for at, (one, ips) in enumerate(having):
            assert all(pool_of(self.pools, address) for address in ips)
            for other, theirs in having[:at]:
                assert not set(ips) & set(theirs) or naive.may_share(one, other)


TestHistories = Histories.TestCase
