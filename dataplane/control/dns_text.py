"""Questions and answers for people: the names that a pod's resolver would try, and messages as text.

What is written here was answered by ourselves or by an upstream; dnslib reads it, which knows every type of record.
"""

from dataplane.control.dns_wire import LABEL_MAX, Type, split, to_wire
from dataplane.control.snapshot_dns import DnsRecord

_NDOTS = 5  # what kubelet writes into a pod's resolv.conf


def candidates(name: str, namespace: str, domain: str) -> list[str]:
    """Return the names, with their last dot, that the resolver of a pod in this namespace asks for in turn."""
    if name.endswith("."):
        return [name]
    searched = [f"{name}.{suffix}." for suffix in (f"{namespace}.svc.{domain}", f"svc.{domain}", domain)]
    return [*searched, f"{name}."] if name.count(".") < _NDOTS else [f"{name}.", *searched]


def read_name(text: str) -> bytes:
    """Return a name that somebody has typed.

    Raises:
        ValueError: It is none.
    """
    try:
        return to_wire(split(text))
    except UnicodeEncodeError:
        raise ValueError(f"a label has 1 to {LABEL_MAX} bytes of Latin-1 (got {text!r})") from None


def read_type(text: str) -> int:
    """Return the number of a type by its name, or by ``TYPE65`` (RFC 3597).

    Raises:
        ValueError: There is no such type.
    """
    from dnslib import QTYPE

    word = text.upper()
    number = QTYPE.reverse.get(word)
    if number is None and word.startswith("TYPE") and word[4:].isascii() and word[4:].isdecimal():
        number = int(word[4:])
    if number is None or not 0 < number < 1 << 16 or number == Type.OPT:
        raise ValueError(f"no such type of record (got {text!r})")
    return int(number)


def lines(reply: bytes) -> list[DnsRecord]:
    """Return the records of an answer; none of one that dnslib does not understand."""
    from dnslib import QTYPE, DNSError
    from dnslib import DNSRecord as Message

    try:
        message = Message.parse(reply)
        sections = {"answer": message.rr, "authority": message.auth, "additional": message.ar}
        return [
            {
                "section": section,
                "name": str(record.rname),
                "ttl": int(record.ttl),
                "type": str(QTYPE.get(record.rtype)),
                "data": str(record.rdata),
            }
            for section, records in sections.items()
            for record in records
            if record.rtype != Type.OPT
        ]
    except (DNSError, ValueError):
        return []
