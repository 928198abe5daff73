"""What an API server stores and remembers, without the HTTP: objects, resource versions, history; for `kube_server`.

By kubernetes.io/docs/reference/using-api/api-concepts. There is one counter of versions for everything. A write that
changes nothing has no version. History is kept until it is compacted: a watch or a continue token from before that is
refused with 410. A page of a list shows the version of its first page.
"""

import base64
import copy
import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Object = dict[str, Any]


class Kind(NamedTuple):
    """A collection that the server may have."""

    group: str
    versions: tuple[str, ...]
    plural: str
    kind: str
    namespaced: bool = True
    status: bool = False


KINDS = (
    Kind("", ("v1",), "nodes", "Node", namespaced=False, status=True),
    Kind("", ("v1",), "namespaces", "Namespace", namespaced=False, status=True),
    Kind("", ("v1",), "services", "Service", status=True),
    Kind("", ("v1",), "pods", "Pod", status=True),
    Kind("", ("v1",), "events", "Event"),
    Kind("discovery.k8s.io", ("v1", "v1beta1"), "endpointslices", "EndpointSlice"),
    Kind("coordination.k8s.io", ("v1",), "leases", "Lease"),
    Kind("metallb.io", ("v1beta1",), "ipaddresspools", "IPAddressPool"),
    Kind("metallb.io", ("v1beta1",), "l2advertisements", "L2Advertisement"),
)


class StatusError(Exception):
    """A request that the server refuses, with what its ``Status`` says."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason

    @property
    def status(self) -> Object:
        """The ``Status`` object."""
        return {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": str(self), "reason": self.reason, "code": self.code,
        }  # fmt: skip


def expired(version: int, oldest: int) -> StatusError:
    """Return the refusal of a version that is forgotten."""
    return StatusError(410, "Expired", f"too old resource version: {version} ({oldest})")


class Change(NamedTuple):
    """One write: the object before and after it; None is none."""

    version: int
    plural: str
    before: Object | None
    after: Object | None


class Selector(NamedTuple):
    """What a request wants to see: fields and labels; values of labels are None for "exists", with a "!" for "not"."""

    fields: Mapping[str, str]
    labels: tuple[tuple[str, str, str], ...]
    namespace: str = ""

    @classmethod
    def parse(cls, fields: str, labels: str, namespace: str) -> "Selector":
        """Read ``a=b,c!=d,e,!f``."""
        pairs = dict(part.replace("==", "=").split("=", 1) for part in fields.split(",") if part)
        found = []
        for part in filter(None, (piece.strip() for piece in labels.split(","))):
            if "!=" in part:
                key, value = part.split("!=")
                found.append((key, "!=", value))
            elif "=" in part:
                key, value = part.replace("==", "=").split("=")
                found.append((key, "=", value))
            else:
                found.append((part.lstrip("!"), "!" if part.startswith("!") else "?", ""))
        return cls(pairs, tuple(found), namespace)

    def selects(self, item: Object | None) -> bool:
        """Say whether an object is to be seen."""
        if item is None or (self.namespace and item["metadata"].get("namespace") != self.namespace):
            return False
        for path, value in self.fields.items():
            found: Any = item
            for part in path.split("."):
                found = found.get(part, "") if isinstance(found, dict) else ""
            if found != value:
                return False
        held = item["metadata"].get("labels") or {}
        tests = {"=": lambda a, b: a == b, "!=": lambda a, b: a != b}
        for key, operator, value in self.labels:
            present = key in held
            good = (
                present
                if operator == "?"
                else not present
                if operator == "!"
                else tests[operator](held.get(key), value)
            )
            if not good:
                return False
        return True


EVERYTHING = Selector({}, ())


@dataclass
class Store:
    """The objects of all collections, by ``namespace/name`` (or name), and what became of them.

    Attributes:
        installed: The groups that this server has.
        slice_versions: The versions of discovery.k8s.io that it serves.
        compacted: Every watch or token from before this version is refused.
    """

    objects: dict[str, dict[str, Object]] = field(default_factory=lambda: {kind.plural: {} for kind in KINDS})
    version: int = 1000
    history: list[Change] = field(default_factory=list)
    compacted: int = 0
    installed: set[str] = field(default_factory=lambda: {"", "discovery.k8s.io", "coordination.k8s.io", "metallb.io"})
    slice_versions: tuple[str, ...] = ("v1",)

    def kind(self, group: str, version: str, plural: str) -> Kind:
        """Return a collection that this server has."""
        for kind in KINDS:
            if (kind.group, kind.plural) == (group, plural) and version in self.served(kind):
                return kind
        raise StatusError(404, "NotFound", "the server could not find the requested resource")

    def served(self, kind: Kind) -> tuple[str, ...]:
        """Return in which versions a collection is served; none when its group is not installed."""
        if kind.group not in self.installed:
            return ()
        return tuple(each for each in kind.versions if kind.group != "discovery.k8s.io" or each in self.slice_versions)

    # --- reading -----------------------------------------------------------------------------------------------------

    def get(self, plural: str, key: str) -> Object:
        """Return one object."""
        try:
            return self.objects[plural][key]
        except KeyError:
            raise StatusError(404, "NotFound", f'{plural} "{key}" not found') from None

    def at(self, plural: str, version: int) -> dict[str, Object]:
        """Return a collection as it was."""
        found = dict(self.objects[plural])
        for change in reversed(self.history):
            if change.version <= version:
                break
            if change.plural == plural:
                key = key_of(change.after or change.before or {})
                if change.before is None:
                    found.pop(key, None)
                else:
                    found[key] = change.before
        return found

    def page(self, plural: str, selector: Selector, limit: int = 0, token: str = "") -> tuple[list[Object], Object]:
        """Return a page and its ListMeta."""
        version, start = self.version, ""
        if token:
            try:
                given = json.loads(base64.urlsafe_b64decode(token))
                version, start = given["rv"], given["start"]
            except (ValueError, KeyError):
                raise StatusError(400, "BadRequest", "continue key is not valid") from None
            if version < self.compacted:
                raise StatusError(410, "Expired", "The provided continue parameter is too old")
        items = self.at(plural, version)
        wanted = [items[key] for key in sorted(items) if key > start and selector.selects(items[key])]
        meta: Object = {"resourceVersion": str(version)}
        if limit and len(wanted) > limit:
            following = json.dumps({"rv": version, "start": key_of(wanted[limit - 1])})
            meta["continue"] = base64.urlsafe_b64encode(following.encode()).decode()
            meta["remainingItemCount"] = len(wanted) - limit
            wanted = wanted[:limit]
        return wanted, meta

    def since(self, plural: str, version: int, selector: Selector) -> list[tuple[int, str, Object]]:
        """Return the events after a version: (version, type, object)."""
        if version < self.compacted:
            raise expired(version, self.compacted)
        changes = (change for change in self.history if change.version > version and change.plural == plural)
        return [event for change in changes for event in events_of(change, selector)]

    # --- writing -----------------------------------------------------------------------------------------------------

    def create(self, kind: Kind, namespace: str, item: Object) -> Object:
        """Add an object."""
        item = copy.deepcopy(item)
        metadata = item.setdefault("metadata", {})
        if kind.namespaced:
            metadata["namespace"] = namespace or metadata.get("namespace", "default")
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        key = key_of(item)
        if key in self.objects[kind.plural]:
            raise StatusError(409, "AlreadyExists", f'{kind.plural} "{key}" already exists')
        metadata.setdefault("uid", str(uuid.uuid4()))
        metadata.setdefault("creationTimestamp", "2026-01-02T03:04:05Z")
        item |= {"kind": kind.kind, "apiVersion": f"{kind.group}/{kind.versions[0]}".lstrip("/")}
        return self._write(kind.plural, None, item)

    def replace(self, kind: Kind, key: str, item: Object, *, status: bool = False) -> Object:
        """Replace an object: without its status, or only that."""
        before = self.get(kind.plural, key)
        given = item.get("metadata", {}).get("resourceVersion")
        if given and given != before["metadata"]["resourceVersion"]:
            text = f'Operation cannot be fulfilled on {kind.plural} "{key}": the object has been modified'
            raise StatusError(409, "Conflict", text)
        if status:
            after = {**copy.deepcopy(before), "status": copy.deepcopy(item.get("status", {}))}
        else:
            after = copy.deepcopy(item) | {"kind": before["kind"], "apiVersion": before["apiVersion"]}
            for name in ("uid", "creationTimestamp", "namespace", "name"):
                if name in before["metadata"]:
                    after["metadata"][name] = before["metadata"][name]
            if kind.status:
                after.pop("status", None)
                after |= {"status": before["status"]} if "status" in before else {}
        after["metadata"]["resourceVersion"] = before["metadata"]["resourceVersion"]
        return before if after == before else self._write(kind.plural, before, after)

    def patch(self, kind: Kind, key: str, change: Object, *, status: bool = False) -> Object:
        """Change an object by a merge patch (RFC 7386)."""
        return self.replace(kind, key, merged(self.get(kind.plural, key), change), status=status)

    def delete(self, kind: Kind, key: str) -> Object:
        """Remove an object; return it with the version of its end."""
        before = self.get(kind.plural, key)
        self._write(kind.plural, before, None)
        return before

    def _write(self, plural: str, before: Object | None, after: Object | None) -> Object:
        self.version += 1
        if after is not None:
            after["metadata"]["resourceVersion"] = str(self.version)
            self.objects[plural][key_of(after)] = after
        elif before is not None:
            del self.objects[plural][key_of(before)]
        self.history.append(Change(self.version, plural, before, after))
        return after or before or {}

    def compact(self) -> None:
        """Forget the history."""
        self.history.clear()
        self.compacted = self.version


def events_of(change: Change, selector: Selector) -> Iterable[tuple[int, str, Object]]:
    """Yield what a watch says of a change: an object that no longer fits its selector is deleted for it."""
    was, fits = selector.selects(change.before), selector.selects(change.after)
    if fits and change.after is not None:
        yield change.version, "MODIFIED" if was else "ADDED", change.after
    elif was and change.before is not None:
        ended = copy.deepcopy(change.after or change.before)
        ended["metadata"]["resourceVersion"] = str(change.version)
        yield change.version, "DELETED", ended


def key_of(item: Object) -> str:
    """Return ``namespace/name`` or the name."""
    metadata = item["metadata"]
    return f"{metadata['namespace']}/{metadata['name']}" if metadata.get("namespace") else str(metadata["name"])


def merged(target: Any, patch: Any) -> Any:
    """Apply a merge patch (RFC 7386 2)."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    found = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            found.pop(key, None)
        else:
            found[key] = merged(found.get(key), value)
    return found


def shown(kind: Kind, version: str, item: Object) -> Object:
    """Return an object as a version of its group shows it: v1beta1 has a slice's node and zone in ``topology``."""
    if kind.plural != "endpointslices" or version == "v1":
        return item
    endpoints = []
    for given in item.get("endpoints") or []:
        each = dict(given)
        pairs = {
            "kubernetes.io/hostname": each.pop("nodeName", ""),
            "topology.kubernetes.io/zone": each.pop("zone", ""),
        }
        endpoints.append(each | {"topology": {key: value for key, value in pairs.items() if value}})
    return {**item, "apiVersion": "discovery.k8s.io/v1beta1", "endpoints": endpoints}
