"""selector: the rules of Kubernetes' label selectors, one by one."""

import pytest

from dataplane.control.selector import any_matches, matches
from dataplane.control.state import Selector

LABELS = (("app", "web"), ("empty", ""), ("zone", "z1"))


def where(key: str, operator, *values: str) -> Selector:
    return Selector(expressions=((key, operator, values),))


RULES = [
    ("nothing asked: everything", Selector(), True),
    ("a label", Selector((("app", "web"),)), True),
    ("a label of another value", Selector((("app", "db"),)), False),
    ("a label that is not there", Selector((("tier", "web"),)), False),
    ("all labels", Selector((("app", "web"), ("zone", "z1"))), True),
    ("all labels, one of which differs", Selector((("app", "web"), ("zone", "z2"))), False),
    ("In", where("zone", "In", "z1", "z2"), True),
    ("In, without this value", where("zone", "In", "z2", "z3"), False),
    ("In, without the label", where("tier", "In", "a"), False),
    ("NotIn", where("zone", "NotIn", "z2"), True),
    ("NotIn, with this value", where("zone", "NotIn", "z1"), False),
    ("NotIn, without the label", where("tier", "NotIn", "a"), True),
    ("Exists", where("zone", "Exists"), True),
    ("Exists, with no value", where("empty", "Exists"), True),
    ("Exists, without the label", where("tier", "Exists"), False),
    ("DoesNotExist", where("tier", "DoesNotExist"), True),
    ("DoesNotExist, with no value", where("empty", "DoesNotExist"), False),
    ("labels and expressions", Selector((("app", "web"),), (("zone", "In", ("z2",)),)), False),
]


@pytest.mark.parametrize(("selector", "selected"), [row[1:] for row in RULES], ids=[row[0] for row in RULES])
def test_a_selector_selects_by(selector, selected):
    assert matches(selector, LABELS) is selected


def test_of_several_selectors_one_is_enough_and_none_selects_nothing():
    assert any_matches([where("tier", "Exists"), where("app", "Exists")], LABELS)
    assert not any_matches([where("tier", "Exists")], LABELS)
    assert not any_matches([], LABELS)
