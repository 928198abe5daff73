"""Label selectors, as Kubernetes means them (``LabelSelector`` of meta/v1)."""

from dataplane.control.state import Labels, Selector


def selects(selector: Selector, labels: Labels) -> bool:
    """Whether a selector matches; one that says nothing matches everything.

    ``NotIn`` and ``DoesNotExist`` hold for a label that is missing.
    """
    given = dict(labels)
    if any(given.get(key) != value for key, value in selector.labels):
        return False
    for key, operator, values in selector.expressions:
        present = key in given
        holds = {
            "In": present and given[key] in values,
            "NotIn": not present or given[key] not in values,
            "Exists": present,
            "DoesNotExist": not present,
        }[operator]
        if not holds:
            return False
    return True
