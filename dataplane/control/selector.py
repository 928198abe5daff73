"""Label selectors as Kubernetes means them (``LabelSelector`` of meta/v1); pure.

All parts of a selector have to hold, so an empty one selects everything. NotIn and DoesNotExist also hold for what has
no such label. Of several selectors one is enough.
"""

from collections.abc import Iterable

from dataplane.control.state import Labels, Selector


def matches(selector: Selector, labels: Labels) -> bool:
    """Say whether a selector selects what has these labels."""
    return all(pair in labels for pair in selector.labels) and all(
        _holds(operator, values, dict(labels).get(key)) for key, operator, values in selector.expressions
    )


def any_matches(selectors: Iterable[Selector], labels: Labels) -> bool:
    """Say whether one of the selectors selects what has these labels."""
    return any(matches(selector, labels) for selector in selectors)


def _holds(operator: str, values: tuple[str, ...], value: str | None) -> bool:
    """Decide about one expression; ``value`` is the label's, None without it."""
    if operator == "Exists":
        return value is not None
    if operator == "DoesNotExist":
        return value is None
    return (value in values) == (operator == "In")
