"""Addresses that this machine alone can reach."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def name_of(header: str) -> str:
    """The name in a Host header, without its port."""
    header = header.strip()
    return header[: header.rindex("]") + 1] if header.startswith("[") and "]" in header else header.partition(":")[0]
