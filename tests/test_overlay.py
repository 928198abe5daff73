"""What the API changes stays over what the file says."""

from dataclasses import replace
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from dataplane.control.overlay import Overlay
from dataplane.control.state import Service
from tests.service_states import NAMES, endpoint, endpoints, services, web

A, B = endpoint("10.244.1.10"), endpoint("10.244.2.10")


def test_without_changes_the_files_services_are_the_services():
    base = (web(A), replace(web(), name="other"))
    assert Overlay().over(base) is base


def test_a_service_that_was_set_stands_in_the_place_of_the_files():
    base = (web(A), replace(web(), name="other"))
    found = Overlay().with_service(web(B)).over(base)
    assert [(service.name, service.origin, service.endpoints) for service in found] == [
        ("web", "api", (B,)),
        ("other", "file", ()),
    ]
    assert found[1] is base[1]


def test_a_new_service_comes_after_those_of_the_file():
    found = Overlay().with_service(replace(web(), name="new")).over((web(A),))
    assert [service.name for service in found] == ["web", "new"]


def test_a_deleted_service_is_gone_until_it_is_set_again():
    gone = Overlay().without_service("default/web")
    assert gone.over((web(A),)) == ()
    assert gone.with_service(web(B)).over((web(A),)) == (replace(web(B), origin="api"),)


def test_endpoints_are_changed_one_by_one_whatever_else_the_file_says():
    overlay = Overlay().with_endpoint("default/web", B).without_endpoint("default/web", A.address)
    for scheduler in ("rr", "mh"):
        (found,) = overlay.over((web(A, scheduler=scheduler),))
        assert (found.endpoints, found.scheduler, found.origin) == ((B,), scheduler, "file")


def test_an_endpoint_that_is_drained_keeps_its_place():
    overlay = Overlay().with_endpoint("default/web", replace(A, draining=True))
    (found,) = overlay.over((web(A, B),))
    assert found.endpoints == (replace(A, draining=True), B)


def test_a_service_that_is_set_anew_forgets_what_was_done_to_its_endpoints():
    overlay = Overlay().with_endpoint("default/web", B).with_service(web(A))
    assert overlay.over((web(),))[0].endpoints == (A,)


def test_endpoints_of_a_service_that_the_file_has_lost_are_forgotten():
    overlay = Overlay().with_endpoint("default/web", B).with_endpoint("default/other", B)
    kept = overlay.without_strays((web(A),))
    assert list(kept.endpoints) == ["default/web"]
    assert kept.over((web(A),)) == overlay.over((web(A),))


@given(st.lists(st.sampled_from(NAMES), unique=True), st.data())
def test_services_that_nothing_is_known_of_are_the_same_objects(names, data):
    base = tuple(data.draw(services(name)) for name in names)
    touched: set[str] = set()
    overlay = Overlay()
    for name in data.draw(st.lists(st.sampled_from(NAMES))):
        touched.add(f"default/{name}")
        how = data.draw(st.sampled_from(["set", "delete", "endpoint"]))
        if how == "set":
            overlay = overlay.with_service(Service(name, endpoints=data.draw(endpoints())))
        elif how == "delete":
            overlay = overlay.without_service(f"default/{name}")
        else:
            overlay = overlay.without_endpoint(f"default/{name}", IPv4Address("10.244.1.10"))
    found = overlay.over(base)
    assert len({service.id for service in found}) == len(found)
    assert [service for service in found if service.id not in touched] == [
        each for each in base if each.id not in touched
    ]
    assert all(any(service is each for each in base) for service in found if service.id not in touched)
